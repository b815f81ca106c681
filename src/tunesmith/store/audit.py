"""Who did what: lines that are only ever added."""

from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from tunesmith.spec.strict import Strict
from tunesmith.store.rows import clean
from tunesmith.store.tables import audit_lines, now


class AuditLine(Strict):
    number: int
    at: float
    actor: str
    action: str
    target: str
    request_id: str | None
    detail: dict[str, Any]


def append(
    tx: Connection,
    actor: str,
    action: str,
    target: str,
    request_id: str | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    tx.execute(
        insert(audit_lines).values(
            at=now(),
            actor=clean(actor),
            action=action,
            target=clean(target),
            request_id=None if request_id is None else clean(request_id)[:100],
            detail=detail or {},
        )
    )


def lines(tx: Connection, limit: int = 100, before: int | None = None) -> list[AuditLine]:
    """Newest first; `before` is a number to page on from."""
    query = select(audit_lines).order_by(audit_lines.c.number.desc()).limit(limit)
    if before is not None:
        query = query.where(audit_lines.c.number < before)
    return [AuditLine.model_validate(dict(row)) for row in tx.execute(query).mappings()]

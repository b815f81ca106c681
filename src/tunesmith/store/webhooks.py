"""Webhook endpoints and their deliveries, as their owners see them."""

import json
import secrets
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import ColumnElement, Table, delete, func, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import BadRequestError, ConflictError, NotFoundError
from tunesmith.spec.strict import Strict
from tunesmith.store.outbox import GIVE_UP_SECONDS, TOPIC, drop_owed
from tunesmith.store.rows import clean
from tunesmith.store.tables import now, outbox, touch
from tunesmith.store.tables import webhook_endpoints as endpoints

MAX_ENDPOINTS = 20
"""Of one owner."""
OVERLAP_SECONDS = 24 * 3600.0
"""An old secret still signs for so long, where that was asked for."""


class Endpoint(Strict):
    id: str
    owner: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: str = Field(repr=False)
    disabled_at: float | None
    disabled_reason: str | None
    created_at: float
    updated_at: float | None


class Delivery(Strict):
    """One message to one endpoint, and what became of it."""

    id: str
    event_type: str
    job_id: str
    status: Literal["pending", "delivered", "failed"]
    status_code: int | None
    """Of the last answer."""
    error: str | None
    """Why the last try failed."""
    tries: int
    created_at: float
    next_try_at: float | None
    done_at: float | None


def make(tx: Connection, owner: str, name: str, url: str, event_types: Sequence[str]) -> Endpoint:
    """Raises BadRequestError where the owner has as many as he may."""
    count = select(func.count()).select_from(endpoints).where(endpoints.c.owner == owner)
    if (tx.scalar(count) or 0) >= MAX_ENDPOINTS:
        raise BadRequestError(f"you have {MAX_ENDPOINTS} endpoints, the limit; delete one first")
    endpoint_id = "we_" + secrets.token_hex(12)
    row = {
        "id": endpoint_id,
        "owner": owner,
        "name": clean(name),
        "url": url,
        "event_types": list(event_types),
        "secret": _new_secret(),
    }
    tx.execute(insert(endpoints).values(**row, created_at=now(), updated_at=now()))
    return find(tx, endpoint_id)


def find(tx: Connection, endpoint_id: str, owner: str | None = None) -> Endpoint:
    """Raises NotFoundError, also where it is another owner's."""
    query = select(endpoints).where(endpoints.c.id == clean(endpoint_id))
    row = tx.execute(query).mappings().first()
    if row is None or (owner is not None and row["owner"] != owner):
        raise NotFoundError(
            f"no webhook endpoint {clean(endpoint_id)[:100]!r}; GET /v1/webhook_endpoints lists "
            "yours",
            param="webhook_endpoint_id",
        )
    return _to_endpoint(row)


def page(
    tx: Connection, owner: str | None, after: str | None, limit: int
) -> tuple[list[Endpoint], bool]:
    """Newest first, and whether there are more. Raises BadRequestError for an unknown `after`."""
    guards = [] if owner is None else [endpoints.c.owner == owner]
    found, has_more = _page(tx, endpoints, guards, after, limit)
    return [_to_endpoint(row) for row in found], has_more


def change(tx: Connection, endpoint_id: str, owner: str | None, **values: Any) -> Endpoint:
    """Change name, url or event types, and send again where sending had ended."""
    before = find(tx, endpoint_id, owner)
    values = {name: value for name, value in values.items() if value is not None}
    if "name" in values:
        values["name"] = clean(values["name"])
    wanted = before.model_copy(update={"disabled_at": None, "disabled_reason": None, **values})
    if wanted != before:
        told = {"disabled_at": None, "disabled_reason": None, "updated_at": now(), **values}
        tx.execute(update(endpoints).where(endpoints.c.id == endpoint_id).values(**told))
    return find(tx, endpoint_id)


def rotate(tx: Connection, endpoint_id: str, owner: str | None, should_overlap: bool) -> Endpoint:
    """A new secret; the one before signs beside it for a day, or not at all."""
    before = find(tx, endpoint_id, owner)
    values: dict[str, Any] = {"old_secret": None, "old_secret_until": None}
    if should_overlap:
        values = {"old_secret": before.secret, "old_secret_until": now() + OVERLAP_SECONDS}
    values |= {"secret": _new_secret(), "updated_at": now()}
    tx.execute(update(endpoints).where(endpoints.c.id == endpoint_id).values(**values))
    return find(tx, endpoint_id)


def disable(tx: Connection, endpoint_id: str, url: str, reason: str) -> None:
    """Nothing is sent to this URL any more, until the owner changes the endpoint."""
    is_still_there = (endpoints.c.id == endpoint_id, endpoints.c.url == url)
    values = {"disabled_at": now(), "disabled_reason": reason}
    if tx.execute(update(endpoints).where(*is_still_there).values(**values)).rowcount:
        drop_owed(tx, endpoint_id, reason)


def remove(tx: Connection, endpoint_id: str, owner: str | None) -> None:
    find(tx, endpoint_id, owner)
    tx.execute(delete(outbox).where(outbox.c.endpoint_id == endpoint_id))
    tx.execute(delete(endpoints).where(endpoints.c.id == endpoint_id))


def deliveries(
    tx: Connection, endpoint_id: str, owner: str | None, after: str | None, limit: int
) -> tuple[list[Delivery], bool]:
    """Newest first, and whether there are more. Raises NotFoundError, BadRequestError."""
    find(tx, endpoint_id, owner)
    guards = [outbox.c.endpoint_id == endpoint_id]
    found, has_more = _page(tx, outbox, guards, after, limit)
    return [_to_delivery(row) for row in found], has_more


def redeliver(tx: Connection, endpoint_id: str, delivery_id: str, owner: str | None) -> Delivery:
    """Owe a message once more, under the same id. Raises NotFoundError, ConflictError."""
    endpoint = find(tx, endpoint_id, owner)
    is_it = (outbox.c.endpoint_id == endpoint_id, outbox.c.id == clean(delivery_id))
    if endpoint.disabled_at is not None:
        raise ConflictError("nothing is sent to this endpoint; update it to enable it again")
    values = {
        "due_at": now(),
        "give_up_at": now() + GIVE_UP_SECONDS,
        **dict.fromkeys(("done_at", "status", "error", "holder")),
        "tries": 0,
    }
    again = update(outbox).where(*is_it).values(**values).returning(outbox)
    row = tx.execute(again).mappings().first()
    if row is None:
        raise NotFoundError(f"no delivery {clean(delivery_id)[:100]!r} of this endpoint")
    touch(tx, TOPIC)
    return _to_delivery(row)


def _page(
    tx: Connection,
    table: Table,
    guards: Sequence[ColumnElement[bool]],
    after: str | None,
    limit: int,
) -> tuple[list[RowMapping], bool]:
    query = select(table).where(*guards).order_by(table.c.number.desc()).limit(limit + 1)
    if after is not None:
        number = tx.scalar(select(table.c.number).where(table.c.id == clean(after), *guards))
        if number is None:
            raise BadRequestError(
                f"after: {clean(after)[:100]!r} is in no list of yours; give the id of a page's "
                "last entry",
                param="after",
            )
        query = query.where(table.c.number < number)
    found = list(tx.execute(query).mappings())
    return found[:limit], len(found) > limit


def _to_endpoint(row: RowMapping) -> Endpoint:
    return Endpoint.model_validate({name: row[name] for name in Endpoint.model_fields})


def _to_delivery(row: RowMapping) -> Delivery:
    is_done = row["done_at"] is not None
    return Delivery(
        id=row["id"],
        event_type=json.loads(row["body"])["type"],
        job_id=row["job_id"],
        status="pending" if not is_done else "failed" if row["error"] else "delivered",
        status_code=row["status"],
        error=row["error"],
        tries=row["tries"],
        created_at=row["created_at"],
        next_try_at=None if is_done else row["due_at"],
        done_at=row["done_at"],
    )


def _new_secret() -> str:
    return "whsec_" + b64encode(secrets.token_bytes(32)).decode()

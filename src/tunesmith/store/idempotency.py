"""One answer to one Idempotency-Key, however often the request comes."""

from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from tunesmith.errors import BadRequestError, ValidationError
from tunesmith.spec.strict import Strict
from tunesmith.store.tables import idempotency_keys as kept
from tunesmith.store.tables import now

KEEP_SECONDS = 24 * 3600.0
MAX_KEY_LENGTH = 255


class Stored(Strict):
    status: int
    response: dict[str, Any]


def find(tx: Connection, owner: str, route: str, key: str, body_sha256: str) -> Stored | None:
    """The answer that was given before; in the same transaction as what it answers for.

    Raises ValidationError where the key was used with another body.
    """
    check(key)
    query = select(kept.c.body_sha256, kept.c.status, kept.c.response).where(
        kept.c.owner == owner, kept.c.route == route, kept.c.key == key
    )
    row = tx.execute(query).first()
    if row is None:
        return None
    if row[0] != body_sha256:
        raise ValidationError(
            "this Idempotency-Key was used with another body; send a new key with a new request",
            param="Idempotency-Key",
        )
    return Stored(status=row[1], response=row[2])


def keep(
    tx: Connection, owner: str, route: str, key: str, body_sha256: str, answer: Stored
) -> None:
    """Remember the answer. Call `find` first, in the same transaction."""
    row = {"owner": owner, "route": route, "key": key, "body_sha256": body_sha256}
    values = {**row, "status": answer.status, "response": answer.response}
    tx.execute(insert(kept).values(**values, created_at=now()))


def check(key: str) -> None:
    """Raises BadRequestError where the text can't be a key."""
    if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isprintable() or not key.isascii():
        raise BadRequestError(
            f"an Idempotency-Key is 1 to {MAX_KEY_LENGTH} printable ASCII characters",
            param="Idempotency-Key",
        )


def sweep(tx: Connection, keep_seconds: float = KEEP_SECONDS) -> int:
    """Forget old answers; returns how many."""
    return tx.execute(delete(kept).where(kept.c.created_at < now() - keep_seconds)).rowcount

"""One answer to one Idempotency-Key, however often the request comes."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import bindparam, delete, select
from sqlalchemy.engine import Connection

from tunesmith.errors import BadRequestError, ValidationError
from tunesmith.spec.strict import Strict
from tunesmith.store.prepared import Prepared, insert
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
) -> bool:
    """Remember the answer. False where there is one already: then nothing was changed."""
    return keep_many(tx, [row(owner, route, key, body_sha256, answer)])


def row(owner: str, route: str, key: str, body_sha256: str, answer: Stored) -> dict[str, Any]:
    """As `keep_many` takes it."""
    response = msgspec.json.encode(answer.response).decode()
    asked = {"owner": owner, "route": route, "key": key, "body_sha256": body_sha256}
    return {**asked, "status": answer.status, "response": response}


def keep_many(tx: Connection, answers: Sequence[dict[str, Any]]) -> bool:
    """False where one of them has an answer already: then take the transaction back."""
    return _KEEP.run(tx, answers).rowcount == len(answers)


def _keep(dialect: str) -> Any:
    given = ("owner", "route", "key", "body_sha256", "status", "response")
    values = {name: bindparam(name, type_=kept.c[name].type) for name in given}
    return insert(dialect, kept).values(**values, created_at=now()).on_conflict_do_nothing()


_KEEP = Prepared(_keep)


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

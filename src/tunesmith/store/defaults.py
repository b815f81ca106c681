"""The model that is meant where a request names none: one for each owner, kept among the names."""

from typing import NamedTuple

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from tunesmith.store.rows import clean
from tunesmith.store.tables import names, now

_KIND = "default"


class Default(NamedTuple):
    model: str
    """As it was asked for; resolved anew for each request."""
    precision: str


def put(tx: Connection, owner: str, default: Default) -> None:
    mine = (names.c.kind == _KIND, names.c.name == clean(owner))
    tx.execute(delete(names).where(*mine))
    row = {"kind": _KIND, "name": clean(owner), "owner": clean(owner), "path": default.model}
    detail = {"precision": default.precision}
    tx.execute(insert(names).values(**row, detail=detail, created_at=now()))


def find(tx: Connection, owner: str) -> Default | None:
    query = select(names.c.path, names.c.detail)
    row = tx.execute(query.where(names.c.kind == _KIND, names.c.name == clean(owner))).first()
    return None if row is None else Default(row.path, str(row.detail["precision"]))

"""Work that one API process does for all: a row with a lease, by the database's clock."""

from sqlalchemy import ColumnElement, delete, not_, or_, select, update
from sqlalchemy.engine import Connection

from tunesmith.store.rows import add_once
from tunesmith.store.tables import duties, now

LONGEST_SECONDS = 600.0


def take(tx: Connection, name: str, holder: str, seconds: float) -> bool:
    """Take a duty that is free, or go on with one's own, for so long. False: another has it."""
    is_free = or_(duties.c.holder == holder, duties.c.until < now(), _is_too_late())
    values = {"holder": holder, "until": now() + seconds}
    taken = update(duties).where(duties.c.name == name, is_free).values(**values)
    if tx.execute(taken).rowcount:
        return True
    return add_once(tx, duties, {"name": name, **values})


def may_take(tx: Connection, name: str, holder: str) -> bool:
    """Whether `take` would succeed: a look, which costs no commit."""
    is_anothers = (duties.c.name == name, duties.c.holder != holder, duties.c.until >= now())
    query = select(duties.c.name).where(*is_anothers, not_(_is_too_late()))
    return tx.execute(query).first() is None


def _is_too_late() -> ColumnElement[bool]:
    """Nobody takes a duty for so long: the clock was set back since."""
    return duties.c.until > now() + LONGEST_SECONDS


def release(tx: Connection, holder: str) -> None:
    """Give up all that a process had, so that another need not wait for the leases' end."""
    tx.execute(delete(duties).where(duties.c.holder == holder))

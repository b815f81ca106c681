"""A job's events as those who follow it read them: from a number on, and how far there is any."""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import NotFoundError
from tunesmith.spec.records import JobState
from tunesmith.store.tables import events, jobs

Told = tuple[str, dict[str, Any]]
"""An event's type and data."""
AT_ONCE = 500
"""Jobs in one question."""
_FINAL = {state.value for state in JobState if state.is_final}
_STANDING = ("state", "progress", "step", "total_steps", "metrics", "last_seq")


def rows_after(tx: Connection, job_id: str, seq: int, limit: int) -> Iterator[RowMapping]:
    """Up to `limit` events that follow number `seq`, in order; the rest of a page that nobody
    asks for is not decoded."""
    query = (
        select(events.c.seq, events.c.fence, events.c.at, events.c.type, events.c.data)
        .where(events.c.job_id == job_id, events.c.seq > seq)
        .order_by(events.c.seq)
        .limit(limit)
    )
    return iter(tx.execute(query).mappings())


def heads(tx: Connection, job_ids: Sequence[str]) -> dict[str, tuple[int, bool]]:
    """For each job that there is: its last event's number, and whether it has ended."""
    found: dict[str, tuple[int, bool]] = {}
    for start in range(0, len(job_ids), AT_ONCE):
        part = job_ids[start : start + AT_ONCE]
        query = select(jobs.c.id, jobs.c.last_seq, jobs.c.state).where(jobs.c.id.in_(part))
        found |= {row[0]: (row[1], row[2] in _FINAL) for row in tx.execute(query)}
    return found


def told(tx: Connection, job_id: str, types: Sequence[str], within: int) -> list[Told]:
    """Events of these types among the first `within` numbers and the last ones, in order."""
    last = select(jobs.c.last_seq).where(jobs.c.id == job_id).scalar_subquery()
    query = (
        select(events.c.type, events.c.data)
        .where(events.c.job_id == job_id, events.c.type.in_(types))
        .where(or_(events.c.seq <= within, events.c.seq > last - within))
        .order_by(events.c.seq)
    )
    return [(row[0], row[1]) for row in tx.execute(query)]


def standing(tx: Connection, job_id: str) -> dict[str, Any]:
    """How a job stands, for a reader who missed events; `first_seq` is the oldest that is kept.

    Raises NotFoundError.
    """
    columns = [jobs.c[name] for name in _STANDING]
    row = tx.execute(select(*columns).where(jobs.c.id == job_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"no job {job_id!r}; GET /jobs lists them")
    first = tx.scalar(select(func.min(events.c.seq)).where(events.c.job_id == job_id))
    return {"job_id": job_id, "first_seq": first or row["last_seq"] + 1, **row}

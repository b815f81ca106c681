"""A job's row: how it becomes a `Job`, and the one guarded UPDATE through which it changes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    and_,
    bindparam,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import FencedError, NotFoundError
from tunesmith.spec.records import Job, JobState
from tunesmith.store import outbox, prepared
from tunesmith.store.tables import (
    attempts,
    events,
    is_held,
    jobs,
    now,
    quotas,
    reservations,
    touch,
)

LAPSE = "lapse"
"""The reason for waiting again after which the same attempt may still come back."""
Line = tuple[str, dict[str, Any]]
"""Type and data of an event."""

_ADD_EVENT = insert(events).values(at=now())
_HAS_LAPSED = and_(jobs.c.state == JobState.QUEUED.value, jobs.c.requeue_reason == LAPSE)
_FIND = select(jobs).where(jobs.c.id == bindparam("job_id"))
_LOCK = _FIND.with_for_update()
_RELEASE = delete(reservations).where(reservations.c.holder == bindparam("holder"))
_CLOSE_ATTEMPTS = (
    update(attempts)
    .where(attempts.c.job_id == bindparam("job"), attempts.c.ended_at.is_(None))
    .values(ended_at=now())
)
_INNER = ("number", "needs_gpus", "needs_memory_bytes", "should_checkpoint")


def to_job(row: Mapping[Any, Any]) -> Job:
    values = dict(row)
    _, gpus, memory_bytes, _ = (values.pop(name) for name in _INNER)
    values["needs"] = {"gpus": gpus, "memory_bytes": memory_bytes}
    values["reward_models"] = values["reward_models"] or ()
    return Job.model_validate(values)


def all_jobs(tx: Connection, query: Select[Any]) -> list[Job]:
    """The jobs that a query of whole rows brings."""
    found = tx.execute(query)
    names = list(found.keys())
    return [to_job(dict(zip(names, row, strict=True))) for row in found]


def no_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"no job {clean(job_id)[:100]!r}; GET /jobs lists them")


def fenced(job_id: str, fence: int) -> FencedError:
    return FencedError(f"attempt {fence} of job {job_id} is over; another one owns the job")


def clean(text: str) -> str:
    """Text as both databases can keep it: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def add_once(tx: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Insert a row; False where one with a key of its is there, or comes from another process."""
    added = prepared.insert(tx.dialect.name, table).values(row).on_conflict_do_nothing()
    return tx.execute(added.returning(*table.primary_key)).first() is not None


def find(tx: Connection, job_id: str, owner: str | None = None) -> RowMapping:
    """Raises NotFoundError, also where the job is another owner's."""
    return _one(tx, _FIND, job_id, owner)


def lock(tx: Connection, job_id: str, owner: str | None = None) -> RowMapping:
    """The row, kept from changing until the transaction ends."""
    return _one(tx, _LOCK, job_id, owner)


def _one(tx: Connection, query: Any, job_id: str, owner: str | None) -> RowMapping:
    row: RowMapping | None = tx.execute(query, {"job_id": clean(job_id)}).mappings().first()
    if row is None or (owner is not None and row["owner"] != owner):
        raise no_job(job_id)
    return row


def as_seen(row: RowMapping) -> ColumnElement[bool]:
    """The guard of a change decided on `row`: nobody moved the job since."""
    return and_(
        jobs.c.state == row["state"],
        jobs.c.fence == row["fence"],
        jobs.c.stop_mode.is_not_distinct_from(row["stop_mode"]),
    )


def is_current(fence: int) -> ColumnElement[bool]:
    """The guard of a worker's write: its attempt holds the job, or may take it back."""
    return and_(jobs.c.fence == fence, or_(is_held(), _HAS_LAPSED))


def change(
    tx: Connection,
    job_id: str,
    guard: ColumnElement[bool],
    lines: Sequence[Line],
    **values: Any,
) -> RowMapping | None:
    """Change the row where `guard` holds, write the events that tell of it, and owe the messages.

    Returns the row after the change, or None where the guard kept it as it was.
    """
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, guard)
        .values(**values, last_seq=jobs.c.last_seq + len(lines))
        .returning(jobs)
    )
    row: RowMapping | None = tx.execute(statement).mappings().first()
    if row is None:
        return None
    write_lines(tx, job_id, row["fence"], row["last_seq"] - len(lines) + 1, lines)
    if "state" in values or "is_validated" in values:
        touch(tx, "queue")
    if values.get("state") in outbox.TYPES:
        outbox.owe(tx, row)
    return row


def write_lines(
    tx: Connection, job_id: str, fence: int, first_seq: int, lines: Sequence[Line]
) -> None:
    """Insert events whose numbers were taken by an UPDATE of the job's row."""
    touch(tx, f"job:{job_id}")
    if lines:
        tx.execute(
            _ADD_EVENT,
            [
                {"job_id": job_id, "fence": fence, "seq": seq, "type": kind, "data": data}
                for seq, (kind, data) in enumerate(lines, first_seq)
            ],
        )


def let_go(state: JobState) -> dict[str, Any]:
    """The columns of a job that no worker holds any more."""
    return {
        "state": state.value,
        "worker_id": None,
        "lease_until": None,
        "stop_mode": None,
        "stop_deadline": None,
        "should_checkpoint": False,
        "eta_seconds": None,
        "requeue_reason": None,
    }


def end(
    tx: Connection,
    row: RowMapping,
    state: JobState,
    data: dict[str, Any],
    guard: ColumnElement[bool] | None = None,
    **values: Any,
) -> RowMapping | None:
    """Move a job to a final state: the last event, its devices and its place in the quota."""
    assert state.is_final
    values = {**let_go(state), "finished_at": now(), **values}
    is_seen = as_seen(row) if guard is None else and_(as_seen(row), guard)
    ended = change(tx, row["id"], is_seen, [(state.value, data)], **values)
    if ended is not None:
        release(tx, row["id"])
        close_attempts(tx, row["id"])
        tx.execute(
            update(quotas)
            .where(quotas.c.owner == row["owner"])
            .values(unfinished=quotas.c.unfinished - 1)
        )
    return ended


def release(tx: Connection, job_id: str) -> None:
    """Free what the job occupied."""
    tx.execute(_RELEASE, {"holder": f"job:{job_id}"})


def close_attempts(tx: Connection, job_id: str) -> None:
    tx.execute(_CLOSE_ATTEMPTS, {"job": job_id})

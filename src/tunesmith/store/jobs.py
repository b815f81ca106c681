"""A job from the user's side: look, stop, go on. Functions of an open transaction.

Every change of state is one UPDATE with its guard in the WHERE, and the event that tells of it is
in the same transaction. How it comes in is in `submissions`, the worker's side in `claims` and
`endings`; they are offered here as well.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, func, or_, select
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import ConflictError, FailureClass
from tunesmith.spec.records import Job, JobState, StopMode
from tunesmith.store import rows
from tunesmith.store.claims import (
    Claimed,
    check_token,
    claim,
    grant_grace,
    heartbeat,
    may_claim,
    request_checkpoint,
    unfit,
)
from tunesmith.store.endings import finish, forget_boot, reap
from tunesmith.store.submissions import OneByOne, submit, submit_many
from tunesmith.store.tables import jobs, now

__all__ = [
    "Claimed",
    "OneByOne",
    "check_token",
    "claim",
    "count_by_state",
    "fail_queued",
    "finish",
    "forget_boot",
    "get",
    "grant_grace",
    "heartbeat",
    "list_jobs",
    "mark_validated",
    "may_claim",
    "queue_place",
    "reap",
    "request_checkpoint",
    "request_stop",
    "resume",
    "submit",
    "submit_many",
    "tell_waiting",
    "to_validate",
    "unfit",
]

_WAITING = (JobState.QUEUED.value, JobState.PAUSED.value)
_STRENGTH = {StopMode.PAUSE: 0, StopMode.CANCEL: 1, StopMode.FORCE: 2}


def get(tx: Connection, job_id: str, owner: str | None = None) -> Job:
    """Raises NotFoundError; without `owner`, every job is seen."""
    return rows.to_job(rows.find(tx, job_id, owner))


def list_jobs(
    tx: Connection,
    *,
    owner: str | None = None,
    states: Sequence[JobState] | None = None,
    limit: int | None = None,
    offset: int = 0,
) -> list[Job]:
    """Newest first."""
    query = select(jobs).order_by(jobs.c.number.desc()).limit(limit).offset(offset)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if states is not None:
        query = query.where(jobs.c.state.in_([state.value for state in states]))
    return rows.all_jobs(tx, query)


def queue_place(tx: Connection, job_id: str) -> int:
    """1 for the next to be claimed; 0 where the job does not wait."""
    row = rows.find(tx, job_id)
    if row["state"] != JobState.QUEUED.value:
        return 0
    is_before = or_(
        jobs.c.priority > row["priority"],
        and_(jobs.c.priority == row["priority"], jobs.c.number < row["number"]),
    )
    waiting = jobs.c.state == JobState.QUEUED.value
    ahead = tx.scalar(select(func.count()).select_from(jobs).where(waiting, is_before))
    return 1 + (ahead or 0)


def count_by_state(tx: Connection, owner: str | None = None) -> dict[JobState, int]:
    """Every state, with 0 where there is none."""
    query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    found: dict[str, int] = dict(tx.execute(query).tuples().all())
    return {state: found.get(state.value, 0) for state in JobState}


def to_validate(tx: Connection, limit: int = 100, but: Collection[str] = ()) -> list[Job]:
    """Queued jobs whose data has not been checked yet, oldest first; `but` are left out."""
    query = (
        select(jobs)
        .where(jobs.c.state == JobState.QUEUED.value, jobs.c.is_validated.is_(False))
        .where(jobs.c.id.not_in(bindparam("but", list(but), expanding=True, literal_execute=True)))
        .order_by(jobs.c.number)
        .limit(limit)
    )
    return rows.all_jobs(tx, query)


def tell_waiting(tx: Connection, job_id: str, notice: dict[str, Any]) -> bool:
    """Write what the user of a job that waits for its check should know. False: it does not."""
    guard = and_(jobs.c.state == JobState.QUEUED.value, jobs.c.is_validated.is_(False))
    return rows.change(tx, job_id, guard, [("notice", notice)]) is not None


def mark_validated(tx: Connection, job_id: str, detail: dict[str, Any]) -> Job:
    """Let a queued job be claimed; anything else is left as it is."""
    guard = and_(jobs.c.state == JobState.QUEUED.value, jobs.c.is_validated.is_(False))
    row = rows.change(tx, job_id, guard, [("validated", detail)], is_validated=True)
    return rows.to_job(row) if row else get(tx, job_id)


def fail_queued(
    tx: Connection,
    job_id: str,
    failure_class: FailureClass,
    message: str,
    hint: str | None = None,
) -> Job:
    """End a job that no worker will take; one that is no longer queued is left as it is."""
    row = rows.lock(tx, job_id)
    message, hint = rows.clean(message), rows.clean(hint or failure_class.hint)
    data = {"failure_class": failure_class.value, "message": message, "hint": hint}
    values = {"failure_class": failure_class.value, "error": message, "hint": hint}
    guard = jobs.c.state == JobState.QUEUED.value
    ended = rows.end(tx, row, JobState.FAILED, data, guard, **values)
    return rows.to_job(ended or row)


def request_stop(
    tx: Connection,
    job_id: str,
    mode: StopMode,
    grace_seconds: float,
    owner: str | None = None,
) -> Job:
    """Cancel or pause. A waiting job stops at once, a held one is asked to, with a deadline.

    Asked again, it changes nothing unless the new mode is stronger (pause < cancel < force).
    Raises ConflictError where the job has ended, or where a pause is asked of a cancelled one.
    """
    row = rows.lock(tx, job_id, owner)
    state = JobState(row["state"])
    if state.is_final:
        raise ConflictError(f"job {job_id} has already ended: it is {state}")
    stopped = _stop_row(tx, row, state, mode, grace_seconds)
    return rows.to_job(stopped or row)


def _stop_row(
    tx: Connection, row: RowMapping, state: JobState, mode: StopMode, grace_seconds: float
) -> RowMapping | None:
    """None where there is nothing to change."""
    if state.value in _WAITING:
        if mode is not StopMode.PAUSE:
            return rows.end(tx, row, JobState.CANCELLED, {"mode": mode.value}, _is_waiting())
        if state is JobState.PAUSED:
            return None
        values = rows.let_go(JobState.PAUSED)
        return rows.change(tx, row["id"], rows.as_seen(row), [("paused", {})], **values)
    if state is JobState.STOPPING:
        before = StopMode(row["stop_mode"])
        if mode is StopMode.PAUSE and before is not StopMode.PAUSE:
            raise ConflictError(f"job {row['id']} is being cancelled and can't be paused")
        if _STRENGTH[mode] <= _STRENGTH[before]:
            return None
    wait = 0.0 if mode is StopMode.FORCE else grace_seconds
    return rows.change(
        tx,
        row["id"],
        rows.as_seen(row),
        [("stopping", {"mode": mode.value, "grace_seconds": wait})],
        state=JobState.STOPPING.value,
        stop_mode=mode.value,
        stop_deadline=now() + wait,
    )


def _is_waiting() -> ColumnElement[bool]:
    return jobs.c.state.in_(_WAITING)


def resume(tx: Connection, job_id: str, owner: str | None = None) -> Job:
    """Put a paused job back into the queue. Raises ConflictError where it is not paused."""
    row = rows.lock(tx, job_id, owner)
    values = {"state": JobState.QUEUED.value, "requeue_reason": "resume", "lapses": 0}
    guard = jobs.c.state == JobState.PAUSED.value
    resumed = rows.change(tx, job_id, guard, [("resumed", {})], not_before=now(), **values)
    if resumed is None:
        raise ConflictError(f"job {job_id} is {row['state']}, not paused; only that can go on")
    return rows.to_job(resumed)

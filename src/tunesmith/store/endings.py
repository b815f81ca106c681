"""How an attempt ends, and what becomes of its job: the table of states, in one place."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import FailureClass
from tunesmith.manifest import MANIFEST, Manifest
from tunesmith.spec.pipe import Checkpointed
from tunesmith.spec.records import Job, JobState, Outcome, StopMode
from tunesmith.store import events, rows
from tunesmith.store.tables import attempts, is_held, jobs, now

MAX_BACKOFF_SECONDS = 300.0
OVERDUE_SECONDS = 60.0
"""Past its deadline, a job that should have stopped is taken from its worker."""
Promote = Callable[[Job], str]
"""Moves a job's artifact to its `output_dir` and returns that path."""


@dataclass(frozen=True)
class Retry:
    """How often a job is tried again, and how long it waits."""

    max_lapses: int
    backoff_seconds: float
    """Before the second attempt; doubled each time."""

    def wait_seconds(self, lapses: int) -> float:
        return float(min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2.0 ** min(lapses - 1, 30)))


@dataclass(frozen=True)
class Verdict:
    state: JobState
    reason: str = ""
    """Why the job waits again."""
    is_lapse: bool = False
    """Whether it counts towards `max_lapses`."""
    failure_class: FailureClass | None = None
    message: str = ""
    hint: str = ""


def finish(
    tx: Connection,
    job_id: str,
    fence: int,
    outcome: Outcome,
    *,
    promote: Promote | str | None = None,
    max_lapses: int = 3,
    backoff_seconds: float = 1.0,
) -> Job:
    """End an attempt. Raises FencedError where it is not the current one.

    The same outcome sent again changes nothing. A job that succeeds is promoted here, under the
    fence and before the commit: `promote` is called only where it is about to be recorded, and
    must do nothing the second time (or it is the path, where that was done before).
    """
    row = rows.lock(tx, job_id)
    recorded = _recorded(tx, job_id, fence)
    if recorded is not None:
        if recorded != outcome.model_dump(mode="json"):
            raise rows.fenced(job_id, fence)
        return rows.to_job(row)
    if JobState(row["state"]).is_final:  # nothing was made ready to promote, then
        raise rows.fenced(job_id, fence)
    retry = Retry(max_lapses, backoff_seconds)
    verdict = _judge(row, outcome, retry)
    is_oom = verdict.failure_class is FailureClass.OOM_HOST and not row["stop_mode"]
    if is_oom and row["lapses"] + 1 < retry.max_lapses and not _has_failed_so(tx, job_id):
        verdict = replace(verdict, state=JobState.QUEUED, reason="failure")
    settled = _settle(tx, row, verdict, rows.is_current(fence), outcome, promote, retry)
    if settled is None:
        raise rows.fenced(job_id, fence)
    _record(tx, job_id, fence, outcome)
    if verdict.state is JobState.CANCELLED and outcome.artifact and outcome.manifest_sha256:
        _keep_artifact(tx, job_id, fence, outcome)
    return rows.to_job(settled)


def _has_failed_so(tx: Connection, job_id: str) -> bool:
    """Whether memory ran out under an earlier attempt: once, a neighbour may have taken it."""
    query = select(attempts.c.outcome).where(attempts.c.job_id == job_id)
    outcomes = (outcome for outcome in tx.scalars(query) if outcome)
    return any(outcome["failure_class"] == FailureClass.OOM_HOST for outcome in outcomes)


def _judge(row: RowMapping, outcome: Outcome, retry: Retry) -> Verdict:
    """What the outcome means for a job in this state; the guards are checked elsewhere."""
    mode = StopMode(row["stop_mode"]) if row["stop_mode"] else None
    if mode in (StopMode.CANCEL, StopMode.FORCE):
        return Verdict(JobState.CANCELLED)
    if outcome.kind == "succeeded" and outcome.artifact:
        return Verdict(JobState.SUCCEEDED)
    if outcome.kind == "stopped":
        paused, waiting = Verdict(JobState.PAUSED), Verdict(JobState.QUEUED, "stopped")
        return paused if mode is StopMode.PAUSE else waiting
    default = FailureClass.NO_ARTIFACT if outcome.kind == "succeeded" else FailureClass.INFRA_LOST
    failure = outcome.failure_class or default
    if failure.is_retryable and mode is StopMode.PAUSE:
        return Verdict(JobState.PAUSED)
    message = outcome.message or "the trainer failed without a word; see the end of the job's log"
    return _failed(row, failure, message, outcome.hint, retry, "failure")


def _failed(
    row: RowMapping, failure: FailureClass, message: str, hint: str, retry: Retry, reason: str
) -> Verdict:
    told = (failure, rows.clean(message), rows.clean(hint or failure.hint))
    if failure.is_retryable and row["lapses"] + 1 < retry.max_lapses:
        return Verdict(JobState.QUEUED, reason, True, *told)
    if failure.is_retryable and reason != rows.LAPSE and row["lapses"]:
        told = (failure, told[1] + _tries(row["lapses"] + 1), told[2])
    return Verdict(JobState.FAILED, "", True, *told)


def _tries(count: int) -> str:
    return f" ({count} attempts in a row failed without a new checkpoint; this was the last)"


def _settle(
    tx: Connection,
    row: RowMapping,
    verdict: Verdict,
    guard: ColumnElement[bool],
    outcome: Outcome | None,
    promote: Promote | str | None,
    retry: Retry,
) -> RowMapping | None:
    """Carry a verdict out. None where the guard kept the job as it was."""
    lapses = row["lapses"] + verdict.is_lapse
    match verdict.state:
        case JobState.QUEUED:
            return _wait_again(tx, row, verdict, guard, lapses, retry)
        case JobState.PAUSED:
            return _pause(tx, row, guard)
        case JobState.CANCELLED:
            return rows.end(tx, row, JobState.CANCELLED, {"step": row["step"]}, guard)
        case JobState.FAILED:
            told = {
                "failure_class": verdict.failure_class,
                "message": verdict.message,
                "hint": verdict.hint,
            }
            return rows.end(
                tx,
                row,
                JobState.FAILED,
                told,
                guard,
                lapses=lapses,
                failure_class=verdict.failure_class,
                error=verdict.message,
                hint=verdict.hint,
            )
        case _:
            assert verdict.state is JobState.SUCCEEDED
            assert outcome is not None
            return _succeed(tx, row, guard, outcome, promote)


def _succeed(
    tx: Connection,
    row: RowMapping,
    guard: ColumnElement[bool],
    outcome: Outcome,
    promote: Promote | str | None,
) -> RowMapping | None:
    """The path is written before the files move, so that only the attempt that won moves them."""
    assert promote is not None, "a job succeeds only with its artifact promoted"
    values = {"progress": 1.0, "step": max(row["step"], outcome.step)}
    data = {"artifact": row["output_dir"], "step": outcome.step}
    path = promote if isinstance(promote, str) else row["output_dir"]
    ended = rows.end(tx, row, JobState.SUCCEEDED, data, guard, artifact=path, **values)
    if ended is not None and callable(promote):
        promoted = promote(rows.to_job(row))
        assert promoted == path, "promoted to another folder than the job's"
    return ended


def _wait_again(
    tx: Connection,
    row: RowMapping,
    verdict: Verdict,
    guard: ColumnElement[bool],
    lapses: int,
    retry: Retry,
) -> RowMapping | None:
    wait = retry.wait_seconds(lapses) if verdict.is_lapse else 0.0
    data: dict[str, Any] = {"reason": verdict.reason, "wait_seconds": wait, "lapses": lapses}
    if verdict.failure_class is not None:
        data |= {"failure_class": verdict.failure_class.value, "message": verdict.message}
    values = {
        **rows.let_go(JobState.QUEUED),
        "requeue_reason": verdict.reason,
        "not_before": now() + wait,
        "lapses": lapses,
    }
    guard = and_(guard, rows.as_seen(row))
    requeued = rows.change(tx, row["id"], guard, [("requeued", data)], **values)
    if requeued is not None:
        rows.release(tx, row["id"])
    return requeued


def _pause(tx: Connection, row: RowMapping, guard: ColumnElement[bool]) -> RowMapping | None:
    guard = and_(guard, rows.as_seen(row))
    values = rows.let_go(JobState.PAUSED)
    paused = rows.change(tx, row["id"], guard, [("paused", {"step": row["step"]})], **values)
    if paused is not None:
        rows.release(tx, row["id"])
    return paused


def _recorded(tx: Connection, job_id: str, fence: int) -> dict[str, Any] | None:
    query = select(attempts.c.outcome).where(attempts.c.job_id == job_id, attempts.c.fence == fence)
    found: dict[str, Any] | None = tx.scalar(query)
    return found


def _record(tx: Connection, job_id: str, fence: int, outcome: Outcome) -> None:
    tx.execute(
        update(attempts)
        .where(attempts.c.job_id == job_id, attempts.c.fence == fence)
        .values(outcome=outcome.model_dump(mode="json"), ended_at=now())
    )


def _keep_artifact(tx: Connection, job_id: str, fence: int, outcome: Outcome) -> None:
    """What a cancelled job had made stays in its attempt's folder, and is listed."""
    assert outcome.artifact
    assert outcome.manifest_sha256
    try:
        body = (Path(outcome.artifact) / MANIFEST).read_bytes()
        size_bytes = Manifest.model_validate_json(body).size_bytes
    except (OSError, ValueError):
        size_bytes = 0  # on another host
    made = Checkpointed(
        step=outcome.step,
        path=outcome.artifact,
        manifest_sha256=outcome.manifest_sha256,
        size_bytes=size_bytes,
    )
    events.keep_checkpoint(tx, job_id, fence, made)


def reap(
    tx: Connection,
    *,
    max_lapses: int = 3,
    backoff_seconds: float = 1.0,
    overdue_seconds: float = OVERDUE_SECONDS,
    limit: int = 500,
) -> list[Job]:
    """Take back jobs whose worker fell silent, or did not stop in time. Returns their new rows."""
    retry = Retry(max_lapses, backoff_seconds)
    is_lapsed = jobs.c.lease_until < now()
    is_overdue = and_(
        jobs.c.state == JobState.STOPPING.value, jobs.c.stop_deadline < now() - overdue_seconds
    )
    return _take_back(tx, or_(is_lapsed, is_overdue), retry, limit)


def next_lapse(tx: Connection) -> float:
    """Seconds until the first lease that is running lapses; infinite where none is."""
    held = and_(is_held(), jobs.c.lease_until >= now())
    left = tx.scalar(select(func.min(jobs.c.lease_until) - now()).where(held))
    return math.inf if left is None else float(left)


def forget_boot(
    tx: Connection,
    worker_id: str,
    held: Collection[tuple[str, int]],
    *,
    max_lapses: int = 3,
    backoff_seconds: float = 1.0,
) -> list[Job]:
    """Take back what a worker had before it was started again, but for what it still holds."""
    is_its = jobs.c.worker_id == worker_id
    return _take_back(tx, is_its, Retry(max_lapses, backoff_seconds), limit=10_000, kept=held)


def queue_again(tx: Connection, reason: str) -> list[Job]:
    """Take back all that any worker had: it counts as no lapse. What was stopping has stopped."""
    taken, guard, retry = [], is_held(), Retry(1, 0.0)
    for row in tx.execute(select(jobs).where(guard)).mappings().all():
        verdict = _lost(row, retry) if row["stop_mode"] else Verdict(JobState.QUEUED, reason)
        settled = _settle(tx, row, verdict, guard, None, None, retry)
        if settled is not None:
            taken.append(rows.to_job(settled))
    return taken


def _take_back(
    tx: Connection,
    is_lost: ColumnElement[bool],
    retry: Retry,
    limit: int,
    kept: Collection[tuple[str, int]] = (),
) -> list[Job]:
    guard = and_(is_held(), is_lost)
    query = (
        select(jobs)
        .where(guard)
        .order_by(jobs.c.number)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    taken = []
    for row in tx.execute(query).mappings().all():
        if (row["id"], row["fence"]) in kept:
            continue
        settled = _settle(tx, row, _lost(row, retry), guard, None, None, retry)
        if settled is not None:
            taken.append(rows.to_job(settled))
    return taken


def _lost(row: RowMapping, retry: Retry) -> Verdict:
    mode = StopMode(row["stop_mode"]) if row["stop_mode"] else None
    if mode is not None:
        return Verdict(JobState.PAUSED if mode is StopMode.PAUSE else JobState.CANCELLED)
    message = (
        f"the worker {row['worker_id']} fell silent, {row['lapses'] + 1} times in a row without "
        "a new checkpoint"
    )
    return _failed(row, FailureClass.INFRA_LOST, message, "", retry, rows.LAPSE)

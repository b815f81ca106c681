"""What a trainer said, numbered twice: by its worker (`n`), and by the job's row (`seq`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import and_, bindparam, func, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.spec.hands import NumberedEvent
from tunesmith.spec.pipe import (
    Checkpointed,
    Evaluated,
    Finished,
    Notice,
    Replanned,
    Started,
    Step,
    TrainerEvent,
)
from tunesmith.spec.records import CheckpointRow, JobEvent, JobState
from tunesmith.store import rows
from tunesmith.store.tables import attempts, events, jobs, now
from tunesmith.store.tables import checkpoints as checkpoint_rows

MAX_EVENT_BYTES = 65_536
"""Of one event as JSON; a longer one is kept as a notice that says so."""
_EVENT: TypeAdapter[Any] = TypeAdapter(TrainerEvent)
_SHOWN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens_per_second",
    "peak_memory_bytes",
)

_LAST_N = select(attempts.c.last_n).where(
    attempts.c.job_id == bindparam("job"),
    attempts.c.fence == bindparam("of"),
    attempts.c.worker_id == bindparam("by"),
)
_CHECKPOINTS = (
    select(checkpoint_rows)
    .where(checkpoint_rows.c.job_id == bindparam("job"))
    .order_by(checkpoint_rows.c.step.desc(), checkpoint_rows.c.number.desc())
)
_SET_LAST_N = (
    update(attempts)
    .where(attempts.c.job_id == bindparam("job"), attempts.c.fence == bindparam("of"))
    .values(last_n=bindparam("n"))
)


def append(
    tx: Connection, job_id: str, fence: int, worker_id: str, batch: Sequence[NumberedEvent]
) -> int:
    """Store the events that are new and apply them to the row. Returns the last `n` stored.

    A batch sent twice is stored once; behind a gap in `n` nothing is taken. What is no
    `TrainerEvent` is kept as a notice, so that it can't hold up the rest. Raises FencedError.
    """
    row = rows.lock(tx, job_id)
    last_n = _last_n(tx, job_id, fence, worker_id)
    said = _new_events(batch, last_n)
    if not said:
        if row["fence"] != fence:
            raise rows.fenced(job_id, fence)
        return last_n
    values = _apply(row, said)
    lines = [_line(event) for event in said]
    if "state" in values:
        lines.insert(_first_started(said) + 1, ("running", {}))
    guard = and_(rows.is_current(fence), rows.as_seen(row))
    if rows.change(tx, job_id, guard, lines, **values) is None:
        raise rows.fenced(job_id, fence)
    _keep_checkpoints(tx, job_id, fence, said)
    last_n += len(said)
    tx.execute(_SET_LAST_N, {"job": job_id, "of": fence, "n": last_n})
    return last_n


def _last_n(tx: Connection, job_id: str, fence: int, worker_id: str) -> int:
    asked = {"job": job_id, "of": fence, "by": worker_id}
    last_n: int | None = tx.scalar(_LAST_N, asked)
    if last_n is None:
        raise rows.fenced(job_id, fence)
    return last_n


def _new_events(batch: Sequence[NumberedEvent], last_n: int) -> list[Any]:
    said: list[Any] = []
    for numbered in sorted(batch, key=lambda one: one.n):
        if numbered.n == last_n + len(said) + 1:
            said.append(_checked(numbered.event))
    return said


def _checked(event: dict[str, Any]) -> Any:
    try:
        checked = _EVENT.validate_python(event)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, fault["loc"]))[:200]
        return _unreadable(f"the trainer said something unknown: {where}: {fault['msg'][:300]}")
    size = len(msgspec.json.encode(checked.model_dump(mode="json")))
    if size > MAX_EVENT_BYTES:
        return _unreadable(f"an event of {size} bytes was left out; {MAX_EVENT_BYTES} is the limit")
    return checked


def _unreadable(message: str) -> Notice:
    return Notice(level="warning", code="bad_event", message=rows.clean(message))


def _line(event: Any) -> rows.Line:
    return event.type, event.model_dump(mode="json", exclude={"type"})


def _first_started(said: Sequence[Any]) -> int:
    return next(at for at, event in enumerate(said) if isinstance(event, Started))


def _apply(row: RowMapping, said: Sequence[Any]) -> dict[str, Any]:
    """The columns that these events change."""
    values: dict[str, Any] = {}
    for event in said:
        match event:
            case Started():
                values |= _started(row, event)
            case Replanned():
                values["plan"] = event.plan.model_dump(mode="json")
            case Step():
                values |= _stepped(row, values, event)
            case Finished():
                seen = values.get("metrics", row["metrics"])
                values["metrics"] = {**seen, **event.metrics}
            case Evaluated():
                seen = values.get("metrics", row["metrics"])
                values["metrics"] = {**seen, **_named(event.trial, event.metrics)}
            case Checkpointed():
                values |= _checkpointed(row, values, event)
    return values


def _started(row: RowMapping, event: Started) -> dict[str, Any]:
    values: dict[str, Any] = {
        "total_steps": event.total_steps,
        "step": event.start_step,
        "progress": _progress(event.start_step, event.total_steps),
        "started_at": func.coalesce(jobs.c.started_at, now()),
    }
    if row["plan"] is None:
        values["plan"] = event.plan.model_dump(mode="json")
    if row["state"] == JobState.STARTING.value:
        values["state"] = JobState.RUNNING.value
    return values


def _stepped(row: RowMapping, values: dict[str, Any], event: Step) -> dict[str, Any]:
    seen = values.get("metrics", row["metrics"])
    shown = {name: getattr(event, name) for name in _SHOWN}
    if event.trial is not None:
        shown |= _named(event.trial, {"loss": event.loss})
    return {
        "step": event.step,
        "total_steps": event.total_steps,
        "progress": _progress(event.step, event.total_steps),
        "metrics": {**seen, **event.metrics, **shown},
        "eta_seconds": event.eta_seconds,
    }


def _named(trial: str | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of a sweep, each trial's are told apart."""
    return {name if trial is None else f"{trial}/{name}": one for name, one in metrics.items()}


def _checkpointed(row: RowMapping, values: dict[str, Any], event: Checkpointed) -> dict[str, Any]:
    before = values.get("checkpoint_step", row["checkpoint_step"])
    if before is not None and event.step <= before:
        return {"should_checkpoint": False}
    return {"should_checkpoint": False, "checkpoint_step": event.step, "lapses": 0}


def _progress(step: int, total_steps: int) -> float:
    return min(1.0, max(0.0, step / total_steps)) if total_steps > 0 else 0.0


def _keep_checkpoints(tx: Connection, job_id: str, fence: int, said: Sequence[Any]) -> None:
    for event in said:
        if isinstance(event, Checkpointed):
            keep_checkpoint(tx, job_id, fence, event)


def keep_checkpoint(tx: Connection, job_id: str, fence: int, event: Checkpointed) -> None:
    """Accept a checkpoint; one that is known (same attempt, step and path) stays as it is."""
    values = {"job_id": job_id, "fence": fence, **event.model_dump(exclude={"type"})}
    key = [checkpoint_rows.c[name] == values[name] for name in ("job_id", "fence", "step", "path")]
    if tx.scalar(select(checkpoint_rows.c.number).where(*key)) is None:
        tx.execute(insert(checkpoint_rows).values(**values, at=now()))


def after(tx: Connection, job_id: str, seq: int = 0, limit: int = 500) -> list[JobEvent]:
    """Up to `limit` events that follow number `seq`, in order."""
    query = (
        select(events)
        .where(events.c.job_id == job_id, events.c.seq > seq)
        .order_by(events.c.seq)
        .limit(limit)
    )
    return [JobEvent.model_validate(dict(row)) for row in tx.execute(query).mappings()]


def checkpoints(tx: Connection, job_id: str) -> list[CheckpointRow]:
    """Accepted checkpoints, newest first."""
    found = [dict(row) for row in tx.execute(_CHECKPOINTS, {"job": job_id}).mappings()]
    for row in found:
        del row["number"]
    return [CheckpointRow.model_validate(row) for row in found]


def forget_checkpoint(tx: Connection, job_id: str, path: str) -> None:
    """Drop the row of a checkpoint whose folder was taken away."""
    tx.execute(
        checkpoint_rows.delete().where(
            checkpoint_rows.c.job_id == job_id, checkpoint_rows.c.path == path
        )
    )

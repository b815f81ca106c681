"""Jobs come in: one by one, or many in as few statements as one needs."""

import random
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import PurePath
from typing import Any

import msgspec
from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from tunesmith.errors import ConflictError, RateLimitError
from tunesmith.spec.records import Job, JobState, NewJob, Source
from tunesmith.store import rows
from tunesmith.store.prepared import Prepared, insert
from tunesmith.store.tables import UNCHECKED, events, is_unfinished, jobs, now, quotas, touch


class OneByOne(Exception):
    """Something is the matter with one of many, or they are in each other's way."""


def submit(
    tx: Connection, new: NewJob, *, max_unfinished: int, outputs_root: str | PathLike[str]
) -> Job:
    """Write the job and event 1. `output_dir` is `<outputs_root>/<id>` where none was asked for.

    Raises RateLimitError where the owner has `max_unfinished` jobs, ConflictError where an
    unfinished job writes to the same folder.
    """
    at = _take_quota(tx, new.owner, max_unfinished)
    if new.output_dir is not None:
        _refuse_rivals(tx, new.output_dir)
    while True:
        row = _row(new, at, outputs_root)
        try:
            is_added = _ADD.run(tx, [row]).rowcount
        except IntegrityError:
            raise ConflictError(
                f"an unfinished job writes to {row['output_dir']}; choose another output_dir",
                param="output_dir",
            ) from None
        if is_added:  # else the id was taken
            return _begin(tx, [new], [row])[0]


def submit_many(
    tx: Connection,
    news: Sequence[NewJob],
    *,
    max_unfinished: int,
    outputs_root: str | PathLike[str],
) -> list[Job]:
    """As `submit` for each, or not at all. Raises OneByOne; then take the transaction back."""
    if any(new.output_dir is not None for new in news):
        raise OneByOne
    times: dict[str, float] = {}
    for owner, count in sorted(Counter(new.owner for new in news).items()):
        asked = {"by": owner, "count": count, "most": max_unfinished - count}
        at = _TAKE.run(tx, [asked]).scalar()
        if at is None:
            raise OneByOne
        times[owner] = at
    added = [_row(new, times[new.owner], outputs_root) for new in news]
    try:
        if _ADD.run(tx, added).rowcount < len(added):
            raise OneByOne
    except IntegrityError:
        raise OneByOne from None
    return _begin(tx, news, added)


def _begin(tx: Connection, news: Sequence[NewJob], added: Sequence[dict[str, Any]]) -> list[Job]:
    """Their first events, and the jobs as they are now."""
    _ADD_FIRST_EVENT.run(tx, added)
    for row in added:
        touch(tx, f"job:{row['id']}")
        touch(tx, "queue" if row["is_validated"] else UNCHECKED)
    return [_job(new, row) for new, row in zip(news, added, strict=True)]


def _job(new: NewJob, row: dict[str, Any]) -> Job:
    drawn = {name: row[name] for name in ("id", "output_dir", "label", "created_at", "not_before")}
    return Job.model_construct(**{**dict(new), **_FRESH, "metrics": {}, **drawn})


def _row(new: NewJob, at: float, outputs_root: str | PathLike[str]) -> dict[str, Any]:
    """The columns under a new id, as the driver takes them: JSON is text."""
    job_id = f"{random.getrandbits(32):08x}"
    evaluation, tokenizer = new.eval_dataset, new.tokenizer
    return {
        "id": job_id,
        "owner": new.owner,
        "spec": new.spec.model_dump_json(),
        "model": new.model.model_dump_json(),
        "dataset": new.dataset.model_dump_json(),
        "eval_dataset": None if evaluation is None else evaluation.model_dump_json(),
        "reward_models": _all_of(new.reward_models),
        "tokenizer": None if tokenizer is None else tokenizer.model_dump_json(),
        "output_dir": new.output_dir or f"{outputs_root}/{job_id}",
        "needs_gpus": new.needs.gpus,
        "needs_memory_bytes": new.needs.memory_bytes,
        "priority": new.priority,
        "is_validated": new.is_validated,
        "request": msgspec.json.encode(new.request).decode(),
        "label": None if new.label is None else rows.clean(new.label),
        "retry_of": new.retry_of,
        "resume_from": new.resume_from,
        "told": _told(new),
        "created_at": at,
        "not_before": at,
    }


def _all_of(sources: Sequence[Source]) -> str | None:
    if not sources:
        return None
    return f"[{','.join(source.model_dump_json() for source in sources)}]"


def _told(new: NewJob) -> str:
    """The first event's data."""
    told = [] if new.estimate is None else [f'"estimate":{new.estimate.model_dump_json()}']
    if new.warnings:
        told.append(f'"warnings":{msgspec.json.encode(new.warnings).decode()}')
    return f"{{{','.join(told)}}}"


def _add(dialect: str) -> Any:
    own = {name: bindparam(name, type_=jobs.c[name].type) for name in _GIVEN}
    added = insert(dialect, jobs).values(**own, state=JobState.QUEUED.value)
    return added.on_conflict_do_nothing(index_elements=["id"])


def _add_first_event(dialect: str) -> Any:
    own = {
        "job_id": bindparam("id"),
        "at": bindparam("created_at", type_=events.c.at.type),
        "data": bindparam("told", type_=events.c.data.type),
    }
    fixed = {"seq": 1, "fence": 0, "type": "queued"}
    return insert(dialect, events).values(**own, **fixed)


_GIVEN = (
    *("id", "owner", "spec", "model", "dataset", "eval_dataset", "reward_models", "tokenizer"),
    *("output_dir", "needs_gpus", "needs_memory_bytes", "priority", "is_validated", "request"),
    *("label", "retry_of", "resume_from", "created_at", "not_before"),
)
_ADD = Prepared(_add)
_ADD_FIRST_EVENT = Prepared(_add_first_event)
_TAKE = Prepared(
    lambda _: (
        update(quotas)
        .where(quotas.c.owner == bindparam("by"), quotas.c.unfinished <= bindparam("most"))
        .values(unfinished=quotas.c.unfinished + bindparam("count"))
        .returning(now())
    )
)
"""So many more places for an owner, and the time."""
_FRESH: dict[str, Any] = {
    "state": JobState.QUEUED,
    "fence": 0,
    "attempts": 0,
    "lapses": 0,
    "worker_id": None,
    "lease_until": None,
    "stop_mode": None,
    "stop_deadline": None,
    "requeue_reason": None,
    "plan": None,
    "last_seq": 1,
    "progress": 0.0,
    "step": 0,
    "total_steps": None,
    "eta_seconds": None,
    "checkpoint_step": None,
    "artifact": None,
    "failure_class": None,
    "error": None,
    "hint": None,
    "started_at": None,
    "finished_at": None,
}


def _take_quota(tx: Connection, owner: str, max_unfinished: int) -> float:
    """The time. Raises RateLimitError."""
    asked = {"by": owner, "count": 1, "most": max_unfinished - 1}
    at: float | None = _TAKE.run(tx, [asked]).scalar()
    if at is None:
        rows.add_once(tx, quotas, {"owner": owner, "unfinished": 0})
        at = _TAKE.run(tx, [asked]).scalar()
    if at is None:
        raise RateLimitError(
            f"{max_unfinished} of your jobs are unfinished, and that is the limit; wait for one, "
            "or cancel one"
        )
    return at


def _refuse_rivals(tx: Connection, output_dir: str) -> None:
    """One model's folder inside another's would be swept away with it, or keep it from its place.

    Raises ConflictError where the folder is taken, or overlaps with one that is.
    """
    above = [str(parent) for parent in PurePath(output_dir).parents]
    inside = f"{output_dir}/"
    overlaps = or_(
        jobs.c.output_dir.in_([output_dir, *above]),
        func.substr(jobs.c.output_dir, 1, len(inside)) == inside,
    )
    rival = select(jobs.c.id, jobs.c.output_dir).where(is_unfinished(), overlaps).limit(1)
    found = tx.execute(rival).first()
    if found is None:
        return
    job_id, other = found
    how = "" if other == output_dir else f", which overlaps with {output_dir}"
    raise ConflictError(
        f"job {job_id} is not finished and writes to {other}{how}; wait for it, cancel it, or "
        "choose another output_dir",
        param="output_dir",
    )

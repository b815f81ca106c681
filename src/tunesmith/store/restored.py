"""What a restored database has to be told: where it lies now, and that nothing of it runs."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Column, func, or_, select, update
from sqlalchemy.engine import Connection

from tunesmith.store import endings
from tunesmith.store import engines as engine_rows
from tunesmith.store.tables import checkpoints, engines, events, jobs, names

_PATHS: tuple[Column[Any], ...] = (
    jobs.c.output_dir,
    jobs.c.resume_from,
    jobs.c.artifact,
    checkpoints.c.path,
    names.c.path,
    engines.c.model_path,
)
_SOURCES: tuple[Column[Any], ...] = (
    *(jobs.c.model, jobs.c.dataset, jobs.c.eval_dataset, jobs.c.reward_models, jobs.c.tokenizer),
)
_TELLING = ("checkpointed", "finished", "succeeded")
"""Events that name folders."""


def relocate(tx: Connection, old: str, new: str) -> None:
    """Everything under the folder `old` lies under `new` now. Both absolute, without a last `/`."""
    if old == new:
        return
    for column in _PATHS:
        is_under = or_(column == old, column.startswith(old + "/", autoescape=True))
        moved = new + func.substr(column, len(old) + 1)
        tx.execute(update(column.table).where(is_under).values({column.name: moved}))
    for number, *sources in tx.execute(select(jobs.c.number, *_SOURCES)).all():
        moved_sources = {
            column.name: _moved(value, old, new)
            for column, value in zip(_SOURCES, sources, strict=True)
        }
        tx.execute(update(jobs).where(jobs.c.number == number).values(moved_sources))
    for job_id, seq, data in _telling(tx):
        is_it = (events.c.job_id == job_id, events.c.seq == seq)
        tx.execute(update(events).where(*is_it).values(data=_moved(data, old, new)))


def stop_all(tx: Connection) -> list[str]:
    """Queue again what a worker held when the copy was made; no engine runs either.

    Returns the jobs' ids. It counts as no lapse, and a worker that still has an attempt is fenced.
    """
    engine_rows.forget_all(tx)
    return [job.id for job in endings.queue_again(tx, "restored")]


def _telling(tx: Connection) -> Iterator[tuple[str, int, Any]]:
    query = select(events.c.job_id, events.c.seq, events.c.data)
    found = tx.execute(query.where(events.c.type.in_(_TELLING))).all()
    return ((job_id, seq, data) for job_id, seq, data in found)


def _moved(value: Any, old: str, new: str) -> Any:
    """The same JSON, with every path in it that lies under `old` under `new`."""
    if isinstance(value, str):
        return new + value[len(old) :] if value == old or value.startswith(old + "/") else value
    if isinstance(value, dict):
        return {name: _moved(part, old, new) for name, part in value.items()}
    return [_moved(part, old, new) for part in value] if isinstance(value, list) else value

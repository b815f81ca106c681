"""How far each job's events were carried to MLflow: a row written with the job, moved on after each
call that was answered."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, or_, select, update
from sqlalchemy.engine import Connection

from tunesmith.store.tables import is_unfinished, jobs, mirrors, now, touch

TOPIC = "mirror"


@dataclass(frozen=True)
class Mirror:
    job_id: str
    experiment_id: str | None
    run_id: str | None
    sent_seq: int
    """Events up to here are in the run."""
    sent_step: int
    """The last training step that is: an attempt that goes on from a checkpoint says some again."""
    tries: int
    """In a row that failed, this one included."""


def owe(tx: Connection, job_id: str) -> None:
    """In the transaction that submits the job."""
    tx.execute(insert(mirrors).values(job_id=job_id, due_at=now()))
    touch(tx, TOPIC)


def owe_unfinished(tx: Connection) -> None:
    """Of jobs that were submitted while no MLflow server was named."""
    known = select(mirrors.c.job_id)
    missing = select(jobs.c.id, now()).where(is_unfinished(), jobs.c.id.not_in(known))
    tx.execute(insert(mirrors).from_select(["job_id", "due_at"], missing))


def has_due(tx: Connection) -> bool:
    """A look, which costs no commit."""
    return tx.execute(_due().limit(1)).first() is not None


def claim(tx: Connection, holder: str, count: int, lease_seconds: float) -> list[Mirror]:
    """Those with something to tell; jobs that have a run come first, for they are followed now."""
    query = (
        _due()
        .order_by(mirrors.c.run_id.is_(None), mirrors.c.due_at)
        .limit(count)
        .with_for_update(skip_locked=True, of=mirrors)
    )
    taken = [row[0] for row in tx.execute(query)]
    if not taken:
        return []
    held = update(mirrors).where(mirrors.c.job_id.in_(taken))
    values = {"holder": holder, "due_at": now() + lease_seconds, "tries": mirrors.c.tries + 1}
    columns = [mirrors.c[name] for name in Mirror.__dataclass_fields__]
    found = tx.execute(held.values(**values).returning(*columns))
    return [Mirror(*row) for row in found]


def _due() -> Any:
    has_news = or_(mirrors.c.run_id.is_(None), jobs.c.last_seq > mirrors.c.sent_seq)
    return (
        select(mirrors.c.job_id)
        .join(jobs, jobs.c.id == mirrors.c.job_id)
        .where(mirrors.c.done_at.is_(None), mirrors.c.due_at <= now(), has_news)
    )


def record_run(
    tx: Connection, job_id: str, holder: str, experiment_id: str, run_id: str | None
) -> bool:
    """The run that the job has, or None where MLflow lost it: then all is told again.

    False where another process holds the row by now, and nothing was changed.
    """
    return _change(
        tx, job_id, holder, experiment_id=experiment_id, run_id=run_id, sent_seq=0, sent_step=0
    )


def advance(tx: Connection, job_id: str, holder: str, sent_seq: int, sent_step: int) -> bool:
    """So far the run has it."""
    return _change(tx, job_id, holder, sent_seq=sent_seq, sent_step=sent_step, tries=0, error=None)


def let_go(
    tx: Connection,
    job_id: str,
    holder: str,
    wait_seconds: float,
    error: str | None = None,
    is_done: bool = False,
) -> None:
    """Until there is more to tell, or for good."""
    values: dict[str, Any] = {"due_at": now() + wait_seconds, "done_at": now() if is_done else None}
    if error is not None:
        values["error"] = error
    _change(tx, job_id, holder, should_release=True, **values)


def release(tx: Connection, holder: str | None) -> None:
    """Give back what a process holds (None: whoever does)."""
    is_held = mirrors.c.holder.is_not(None) if holder is None else mirrors.c.holder == holder
    tx.execute(update(mirrors).where(is_held).values(holder=None, due_at=now()))


def run_of(tx: Connection, job_id: str) -> tuple[str, str] | None:
    """A job's experiment and run, once it has one."""
    query = select(mirrors.c.experiment_id, mirrors.c.run_id).where(mirrors.c.job_id == job_id)
    row = tx.execute(query).first()
    return (row[0], row[1]) if row is not None and row[1] is not None else None


def _change(
    tx: Connection, job_id: str, holder: str, should_release: bool = False, **values: Any
) -> bool:
    is_held: ColumnElement[bool] = and_(mirrors.c.job_id == job_id, mirrors.c.holder == holder)
    if should_release:
        values["holder"] = None
    return bool(tx.execute(update(mirrors).where(is_held).values(**values)).rowcount)

"""What retention asks of the rows: which jobs are over, and which folders something still names."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.engine import Connection

from tunesmith.spec.records import JobState
from tunesmith.store.tables import checkpoints, engines, is_unfinished, jobs, names, now

_FINAL = tuple(state.value for state in JobState if state.is_final)
_AT_A_TIME = 500


@dataclass(frozen=True)
class Ended:
    """A job that is over."""

    id: str
    fence: int
    """Of its last attempt."""
    state: str
    seconds: float
    """Since its end, by the database's clock."""


def unknown(tx: Connection, ids: Collection[str]) -> set[str]:
    """Which of these are no job's."""
    found: set[str] = set()
    for some in _portions(ids):
        found |= set(tx.scalars(select(jobs.c.id).where(jobs.c.id.in_(some))))
    return set(ids) - found


def ended(tx: Connection, ids: Collection[str]) -> list[Ended]:
    """Those of these jobs that are over."""
    found: list[Ended] = []
    for some in _portions(ids):
        query = select(
            jobs.c.id, jobs.c.fence, jobs.c.state, (now() - jobs.c.finished_at).label("seconds")
        ).where(jobs.c.id.in_(some), jobs.c.state.in_(_FINAL), jobs.c.finished_at.is_not(None))
        found += [Ended(*row) for row in tx.execute(query)]
    return found


def old_checkpoints(tx: Connection, seconds: float) -> list[tuple[str, str]]:
    """Job and path of those that were accepted longer ago than that."""
    query = select(checkpoints.c.job_id, checkpoints.c.path).where(
        checkpoints.c.at < now() - seconds
    )
    return [(job_id, path) for job_id, path in tx.execute(query)]


def named_paths(tx: Connection) -> set[str]:
    """Folders that a model is made from, now or by a job that goes on, or served, or named.

    What a tuned adapter was made from is needed for as long as that may be served.
    """
    paths = select(jobs.c.model["path"].as_string()).where(
        jobs.c.state.not_in(("failed", "cancelled"))
    )
    found = {path for path in tx.scalars(paths.distinct()) if path}
    scoring = select(jobs.c.reward_models).where(is_unfinished(), jobs.c.reward_models.is_not(None))
    found |= {source["path"] for sources in tx.scalars(scoring) for source in sources}
    begun = select(jobs.c.resume_from).where(is_unfinished(), jobs.c.resume_from.is_not(None))
    found |= {path for path in tx.scalars(begun) if path}
    is_live = engines.c.state.in_(("wanted", "starting", "ready"))
    found |= set(tx.scalars(select(engines.c.model_path).where(is_live)))
    found |= set(tx.scalars(select(names.c.path)))
    return found


def _portions(ids: Collection[str]) -> Iterable[list[str]]:
    rest = sorted(ids)
    for start in range(0, len(rest), _AT_A_TIME):
        yield rest[start : start + _AT_A_TIME]

"""Many jobs at once, with no more of each than a list shows: columns as they lie, JSON as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Text, and_, case, cast, func, literal, or_, select
from sqlalchemy.engine import Connection

from tunesmith.spec.records import Job, JobState, StopMode
from tunesmith.store.tables import PINNED, is_unfinished, jobs

MAX_REQUEST_CHARS = 16_384
_TOO_LONG = '{"omitted":"too long for a list: GET /jobs/{job_id} has it"}'


class Line(NamedTuple):
    """A job in a list. Times are Unix seconds."""

    id: str
    owner: str
    method: str
    model_path: str
    request: Any
    """JSON as text, out of the table; in a list a note, where it is over `MAX_REQUEST_CHARS`."""
    label: str | None
    output_dir: str
    state: str
    stop_mode: str | None
    artifact: str | None
    error: str | None
    hint: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True)
class Wanted:
    """States, and of those that are stopping: all, those to be paused, or those to be ended."""

    states: Sequence[JobState]
    is_pausing: bool | None = None

    def clause(self) -> ColumnElement[bool]:
        plain = [state.value for state in self.states if state is not JobState.STOPPING]
        found = jobs.c.state.in_(plain)
        if JobState.STOPPING not in self.states:
            return found
        stopping = jobs.c.state == JobState.STOPPING.value
        if self.is_pausing is not None:
            is_pausing = jobs.c.stop_mode == StopMode.PAUSE.value
            stopping = and_(stopping, is_pausing if self.is_pausing else ~is_pausing)
        return or_(found, stopping)


_REQUEST = cast(jobs.c.request, Text)
_COLUMNS: tuple[ColumnElement[Any], ...] = (
    jobs.c.id,
    jobs.c.owner,
    jobs.c.spec["method"].as_string(),
    jobs.c.model["path"].as_string(),
    case((func.length(_REQUEST) > MAX_REQUEST_CHARS, literal(_TOO_LONG, Text)), else_=_REQUEST),
    *(
        jobs.c[name]
        for name in (
            *("label", "output_dir", "state", "stop_mode", "artifact", "error", "hint"),
            *("created_at", "started_at", "finished_at"),
        )
    ),
)


def lines(
    tx: Connection,
    *,
    owner: str | None = None,
    wanted: Wanted | None = None,
    limit: int | None = None,
    offset: int = 0,
) -> list[Line]:
    """Newest first. Only the rows of the page are read whole."""
    page = select(jobs.c.number).order_by(jobs.c.number.desc()).limit(limit).offset(offset)
    if owner is not None:
        page = page.where(jobs.c.owner == owner)
    if wanted is not None:
        page = page.where(wanted.clause())
    query = select(*_COLUMNS).where(jobs.c.number.in_(page)).order_by(jobs.c.number.desc())
    found = tx.execute(query)
    return [Line(*row) for row in found]


def pinned(tx: Connection) -> set[str]:
    """Digests of the files that unfinished jobs need."""
    found: set[str] = set()
    for column in PINNED:
        digest = column["sha256"].as_string()
        query = select(digest).distinct().where(is_unfinished(), digest.is_not(None))
        found.update(tx.scalars(query))
    return found


def line_of(job: Job) -> Line:
    """The same of a job that is there already, its request read."""
    return Line(
        id=job.id,
        owner=job.owner,
        method=job.spec.method,
        model_path=job.model.path,
        request=job.request,
        label=job.label,
        output_dir=job.output_dir,
        state=job.state.value,
        stop_mode=None if job.stop_mode is None else job.stop_mode.value,
        artifact=job.artifact,
        error=job.error,
        hint=job.hint,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )

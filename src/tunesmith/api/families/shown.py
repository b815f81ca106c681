"""A job as the training contract shows it, one by one or many in a list."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, Field

from tunesmith.hub import Hub
from tunesmith.spec.estimate import Forecast
from tunesmith.spec.records import JobState, StopMode
from tunesmith.spec.sweep import SweepTable
from tunesmith.store.listing import Line, Wanted

Status = Literal["pending", "running", "completed", "failed", "cancelled"]
WORDS: dict[str, Status] = {
    JobState.QUEUED: "pending",
    JobState.PAUSED: "pending",
    JobState.STARTING: "running",
    JobState.RUNNING: "running",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
"""What a state is called; a job that is stopping is called by what it will be."""
MEANT: dict[Status, Wanted] = {
    "pending": Wanted([JobState.QUEUED, JobState.PAUSED]),
    "running": Wanted([JobState.STARTING, JobState.RUNNING, JobState.STOPPING], is_pausing=True),
    "completed": Wanted([JobState.SUCCEEDED]),
    "failed": Wanted([JobState.FAILED]),
    "cancelled": Wanted([JobState.CANCELLED, JobState.STOPPING], is_pausing=False),
}


class JobView(BaseModel):
    """One job. Times are UTC, ISO 8601, to the second."""

    job_id: str = Field(description="8 hex digits")
    training_type: str = Field(description="sft, dpo, else the method's name")
    status: Status = Field(description="pending, running, completed, failed or cancelled")
    config: dict[str, Any] = Field(
        description="the request, with its defaults filled in; a list leaves out what is over 16 KB"
    )
    created_at: str = Field(description="when it was submitted")
    started_at: str | None = Field(description="when its first attempt began")
    completed_at: str | None = Field(description="when it ended, however it ended")
    error: str | None = Field(description="what went wrong, and what to do")
    error_message: str | None = Field(description="repeats `error`")
    log_file: str = Field(description="in the workspace")
    output_dir: str = Field(description="where the model is, or will be")
    fine_tuned_model: str | None = Field(description="the name to chat with, once completed")


class JobDetail(JobView):
    progress: float = Field(description="0 to 1")
    metrics: dict[str, Any] = Field(description="the latest of each")
    eta_seconds: float | None = Field(description="seconds that are left, once it can be told")
    state: JobState = Field(description="the precise state")
    sweep: SweepTable | None = Field(
        None,
        description="what came of each configuration of a sweep, once completed; each can be "
        "chatted with as `<fine_tuned_model>:<name>`, and the best as `fine_tuned_model`",
    )
    attempts: int = Field(description="how often it was started")
    checkpoint_step: int | None = Field(description="the newest whole checkpoint")
    estimate: Forecast | None = Field(
        description="what was told before it ran, and how it went; null where nothing was told"
    )


def shown(hub: Hub, line: Line) -> dict[str, Any]:
    """The fields of a `JobView`."""
    error = line.error if not (line.error and line.hint) else f"{line.error} ({line.hint})"
    return {
        "job_id": line.id,
        "training_type": line.method,
        "status": _word(line),
        "config": line.request,
        "created_at": _stamp(line.created_at) or "",
        "started_at": _stamp(line.started_at),
        "completed_at": _stamp(line.finished_at),
        "error": error,
        "error_message": error,
        "log_file": hub.log_name(line.id),
        "output_dir": hub.relative(line.output_dir),
        "fine_tuned_model": hub.tuned_name(line),
    }


def as_json(hub: Hub, lines: Iterable[Line]) -> bytes:
    """A list of `JobView`s. What was asked for goes from the table to the answer as it is."""
    raw = (line._replace(request=msgspec.Raw(line.request.encode())) for line in lines)
    return msgspec.json.encode([shown(hub, line) for line in raw])


def _word(line: Line) -> Status:
    if line.state == JobState.STOPPING:
        return "running" if line.stop_mode == StopMode.PAUSE else "cancelled"
    return WORDS[line.state]


def _stamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")[:19]

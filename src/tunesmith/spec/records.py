"""What is remembered of a job: its row, its attempts, its events."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from tunesmith.errors import FailureClass
from tunesmith.spec.estimate import Estimate
from tunesmith.spec.pipe import Plan
from tunesmith.spec.strict import JobId, Sha256, Strict
from tunesmith.spec.train import TrainSpec


class JobState(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


class StopMode(StrEnum):
    CANCEL = "cancel"
    """Cooperative: a checkpoint, then the end; killed at the deadline."""
    FORCE = "force"
    """Killed at once."""
    PAUSE = "pause"
    """As cancel, but the job can go on later."""


class Needs(Strict):
    """What a job occupies while it runs."""

    gpus: int = Field(0, ge=0, le=1024)
    memory_bytes: int = Field(0, ge=0)
    """Host memory on a CPU job, memory of one GPU on a GPU job: an estimate."""


class Source(Strict):
    """A resolved input, pinned at submit."""

    name: str
    """As it was asked for."""
    path: str
    """Absolute."""
    sha256: Sha256 | None = None
    """Of a data set's bytes; None for a model folder."""


class NewJob(Strict):
    """All that `store.jobs.submit` writes into a row."""

    owner: str
    spec: TrainSpec
    model: Source
    dataset: Source
    eval_dataset: Source | None = None
    reward_models: tuple[Source, ...] = ()
    tokenizer: Source | None = None
    """In place of the model's own."""
    output_dir: str | None = None
    """Absolute; None means outputs/<job id>."""
    needs: Needs = Needs()
    priority: int = Field(0, ge=-1000, le=1000)
    """Higher goes first."""
    is_validated: bool = False
    request: dict[str, Any] = {}
    """As it was asked for, defaults filled in, secrets masked; shown as `config`."""
    label: str | None = None
    retry_of: JobId | None = None
    resume_from: str | None = None
    """A checkpoint folder to start from, absolute."""
    estimate: Estimate | None = None
    """Kept in the first event."""
    warnings: tuple[str, ...] = ()
    """Kept there as well: sentences on what may not be meant."""


class Job(Strict):
    """The row, as every reader sees it. Times are Unix seconds of the database's clock."""

    id: JobId
    owner: str
    spec: TrainSpec
    model: Source
    dataset: Source
    eval_dataset: Source | None
    reward_models: tuple[Source, ...]
    tokenizer: Source | None = None
    output_dir: str
    needs: Needs
    priority: int
    request: dict[str, Any]
    label: str | None
    retry_of: str | None
    resume_from: str | None

    state: JobState
    is_validated: bool
    fence: int
    """Grows by one at each claim, and only there."""
    attempts: int
    lapses: int
    """Lost leases in a row without a new checkpoint."""
    worker_id: str | None
    lease_until: float | None
    stop_mode: StopMode | None
    stop_deadline: float | None
    not_before: float
    requeue_reason: str | None
    plan: Plan | None
    last_seq: int

    progress: float
    """0 to 1."""
    step: int
    total_steps: int | None
    metrics: dict[str, Any]
    """The latest of each."""
    eta_seconds: float | None
    checkpoint_step: int | None

    artifact: str | None
    """The promoted folder, absolute, once succeeded."""
    failure_class: FailureClass | None
    error: str | None
    hint: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None


class JobEvent(Strict):
    """One line of a job's history. `seq` is 1, 2, 3, … without a gap, in commit order."""

    job_id: JobId
    seq: int = Field(ge=1)
    fence: int
    at: float
    type: str
    """A trainer's word (see `pipe`), or queued, validated, claimed, running, reattached, requeued,
    checkpoint_rejected, stopping, paused, resumed, succeeded, failed, cancelled."""
    data: dict[str, Any]


class CheckpointRow(Strict):
    job_id: JobId
    fence: int
    step: int
    path: str
    manifest_sha256: Sha256
    size_bytes: int
    at: float


class Outcome(Strict):
    """How an attempt ended, as its worker tells it. Sent twice, it counts once."""

    kind: Literal["succeeded", "stopped", "failed"]
    step: int = 0
    artifact: str | None = None
    manifest_sha256: Sha256 | None = None
    failure_class: FailureClass | None = None
    message: str = Field("", max_length=8000)
    hint: str = Field("", max_length=2000)

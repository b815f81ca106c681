"""What a worker and the API say to each other, over HTTP under /internal/v1.

POST …/work                          WorkAsk      → WorkReply  a long poll, worker's token
POST …/attempts/{job}/{fence}/report Report       → Orders     attempt's token
POST …/attempts/{job}/{fence}/finish Outcome      → Orders     attempt's token
POST …/engines/{id}                  EngineReport → 204        worker's token
GET  …/house                                      → House      worker's token
GET  …/waiting                                    → Waiting    worker's token, for dispatchers

409 with code `fenced` on an attempt's route: another attempt owns the job. The worker kills its
trainer and keeps its files.
"""

from typing import Any, Literal

from pydantic import Field

from tunesmith.spec.pipe import Inputs, Plan
from tunesmith.spec.records import CheckpointRow, StopMode
from tunesmith.spec.strict import JobId, Strict
from tunesmith.spec.train import TrainSpec

MAX_EVENTS = 1000
"""In one report."""
DISPATCHER = "ray:"
"""What the id of a worker begins with that has its hands elsewhere, and runs no engine."""
MAX_WAITING = 1000
"""In one answer to a dispatcher."""


class Capacity(Strict):
    """What a worker could take now, and what it has at most."""

    slots: int = Field(ge=0, le=4096)
    """CPU jobs."""
    gpus: tuple[int, ...] = ()
    """Indexes that are free."""
    memory_bytes: int = Field(ge=0)
    max_slots: int = Field(ge=0, le=4096)
    max_gpus: int = Field(0, ge=0, le=1024)
    max_memory_bytes: int = Field(ge=0)


class EngineStatus(Strict):
    id: str = Field(max_length=64)
    state: Literal["starting", "ready", "failed", "stopped"]
    url: str | None = Field(None, max_length=200)
    pid: int | None = None
    error: str | None = Field(None, max_length=4000)


class EngineReport(EngineStatus):
    worker_id: str = Field(max_length=128)


class HeldAttempt(Strict):
    job_id: JobId
    fence: int


class WorkAsk(Strict):
    worker_id: str = Field(min_length=1, max_length=128)
    """One per workspace and host; the same after a restart of the worker."""
    claim_id: str = Field(min_length=1, max_length=64)
    """New for each claim; the same one, after a lost reply, brings the same attempt."""
    capacity: Capacity
    engines: tuple[EngineStatus, ...] = Field((), max_length=256)
    held: tuple[HeldAttempt, ...] = Field((), max_length=4096)
    """Attempts that it runs. Those of an earlier boot that are not held are lost: queued again."""
    boot_id: str = Field("", max_length=64)
    """New at each start of the worker."""
    wait_seconds: float = Field(20, ge=0, le=60)
    only: JobId | None = None
    """Claim this job or none, run no engine: a worker that was started for it."""
    host: dict[str, Any] = {}
    house_id: str | None = Field(None, max_length=64)
    """Of the workspace's folder that it sees; empty: of none. Not said: the API's own."""
    network: str | None = Field(None, max_length=200)
    """Where its loopback reaches; not said: the API. Only there engines are started."""


class Assignment(Strict):
    """An attempt: all that a worker needs to run it."""

    job_id: JobId
    fence: int
    token: str
    spec: TrainSpec
    inputs: Inputs
    attempt_dir: str
    log_path: str
    plan: Plan | None
    """None at the first claim: the trainer's choice comes back in `started` and is kept."""
    threads: int
    gpus: tuple[int, ...] = ()
    checkpoints: tuple[CheckpointRow, ...] = ()
    """Accepted ones, newest first; the worker takes the first that verifies."""
    resume_from: str | None = None
    """A checkpoint folder asked for by the user, used where no own checkpoint is there."""
    lease_seconds: float
    stall_seconds: float
    first_event_n: int = 1
    workspace: str = ""
    """The API's path of the folder that all paths here lie in."""
    is_remote: bool = False
    """The worker does not see that folder: it fetches and sends, see `transfer`."""


class EngineOrder(Strict):
    id: str
    action: Literal["start", "stop"]
    model_path: str = ""
    model_name: str = ""
    key: str = ""
    log_path: str = ""
    threads: int = 1
    precision: str = "auto"
    gpus: tuple[int, ...] = ()
    """Empty: the CPU."""
    grace_seconds: float = 10
    """Of one that should stop: for the requests that it is answering."""
    options: dict[str, Any] = {}


class House(Strict):
    """Which API this is."""

    version: str


class WaitingJob(Strict):
    """What a dispatcher needs to know of a job that may be claimed."""

    job_id: JobId
    gpus: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    """Of the host where it has no GPU."""


class Waiting(Strict):
    """The head of the queue, in the order in which jobs are claimed."""

    jobs: tuple[WaitingJob, ...] = Field((), max_length=MAX_WAITING)


class WorkReply(Strict):
    attempt: Assignment | None = None
    engines: tuple[EngineOrder, ...] = ()
    nudges: tuple[HeldAttempt, ...] = ()
    """Held attempts with new orders: send their heartbeat now."""


class NumberedEvent(Strict):
    """`n` counts from 1 within an attempt, so that a batch sent twice is stored once."""

    n: int = Field(ge=1)
    event: dict[str, Any]
    """A `TrainerEvent`, checked where it is stored."""


class Report(Strict):
    """A heartbeat, with what was said since the last one."""

    worker_id: str = Field(max_length=128)
    events: tuple[NumberedEvent, ...] = Field((), max_length=MAX_EVENTS)


class Orders(Strict):
    """The answer to a heartbeat."""

    stop: StopMode | None = None
    stop_in_seconds: float | None = None
    """Until the whole process session is killed."""
    should_checkpoint: bool = False
    lease_seconds: float
    accepted_n: int = 0
    """The last event number that is stored."""

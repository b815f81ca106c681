"""What goes through a trainer's pipes: its task on stdin, its events on stdout, a line each.

Signals: SIGTERM asks for a checkpoint and an end after the step under way, SIGUSR2 for a
checkpoint, SIGUSR1 writes every thread's stack to the log.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tunesmith.errors import FailureClass
from tunesmith.spec.strict import JobId, Sha256, Strict
from tunesmith.spec.sweep import TrialName
from tunesmith.spec.train import TrainSpec

MetricName = Annotated[str, StringConstraints(min_length=1, max_length=64)]

KNOWN = "checkpoints/.known"
"""In an attempt's folder: the name of the newest checkpoint that the API has accepted, written by
the worker. A trainer lets go of all but the newest ones and that one."""

STAGES = "stages"
"""In an attempt's folder: models of a pretraining as they were on the way, `step-<n>/`, whole."""


class Plan(Strict):
    """What is fixed at a job's first claim, so that every attempt computes the same bits."""

    threads: int = Field(ge=1, le=4096)
    """Of each process."""
    processes: int = Field(1, ge=1, le=1024)
    """That share each step."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether each has a copy of the model, or a part of every weight."""
    device: str = Field("cpu", max_length=40)
    """`cpu`, or `cuda:0` as the trainer sees it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    micro_batch_tokens: int = Field(4096, ge=1, le=1 << 26)
    """The token budget of one forward and backward pass."""
    gradient_checkpointing: bool | None = None
    """Whether activations are computed twice. None, in plans that were made before it was kept
    here: as is asked for, or by the memory that is free when the attempt begins."""


class Inputs(Strict):
    """Resolved, absolute paths."""

    model: str
    dataset: str
    eval_dataset: str | None = None
    reward_models: dict[str, str] = {}
    """By the name in the specification."""
    networks: tuple[str, ...] = ()
    """Beside the public Internet: where a reward service may be."""
    tokenizer: str | None = None
    """In place of the model's own, packed: see `data.brought`."""
    named: dict[str, str] = {}
    """What the result calls a model instead of its path here, where it has another elsewhere."""

    @property
    def name_of_model(self) -> str:
        return self.named.get(self.model, self.model)


class TrainerTask(Strict):
    """All that a trainer is told: one JSON object on stdin, then end of file."""

    job_id: JobId
    fence: int = Field(ge=0)
    spec: TrainSpec
    inputs: Inputs
    attempt_dir: str
    """The only folder it writes to: `checkpoints/step-<n>/` and `artifact/`, and `reward_model/`
    while one that was trained first is in use."""
    resume_from: str | None = None
    """A verified checkpoint folder, maybe of an earlier attempt."""
    plan: Plan | None = None
    """None at the first attempt by hand: the trainer chooses and says so in `started`."""
    is_probe: bool = False
    """Say what a step on the longest samples takes, and stop before the first update."""


class Started(Strict):
    type: Literal["started"] = "started"
    pid: int
    plan: Plan
    total_steps: int
    """Optimizer steps of the whole job, an estimate while `is_total_exact` is false."""
    is_total_exact: bool = True
    start_step: int = 0
    """Steps that the checkpoint resumed from had made."""
    parameters: int
    trainable_parameters: int
    detail: dict[str, Any] = {}


class Replanned(Strict):
    """Memory did not suffice: this is the job's plan from here on, in every later attempt too. Said
    before a step that was made by it; a notice says what happened."""

    type: Literal["replanned"] = "replanned"
    plan: Plan


class Probed(Strict):
    """A step on the longest samples, before the first one that counts."""

    type: Literal["probed"] = "probed"
    samples: int
    tokens: int
    """Of all of them."""
    seconds: float
    peak_memory_bytes: int
    """With what the optimizer sets aside at the first update."""


class Step(Strict):
    type: Literal["step"] = "step"
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    epoch: float
    loss: float | None
    """Null where it was not a finite number."""
    learning_rate: float
    grad_norm: float | None
    """Before clipping."""
    tokens: int
    """Of this step, padding excluded."""
    label_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    cpu_seconds: float = 0.0
    """Of this process, since it was started or forked."""
    eta_seconds: float | None = None
    metrics: dict[MetricName, float] = Field({}, max_length=64)
    """What the method tells of this step beside: rewards, margins, …"""
    trial: TrialName | None = None
    """Of a sweep: whose step it was. `step` and `total_steps` then count those of all trials, and
    all else is of this trial. So it is with a reward model that a job trains first."""
    trial_step: int | None = Field(None, ge=0)


class Evaluated(Strict):
    type: Literal["evaluated"] = "evaluated"
    step: int
    metrics: dict[str, float]
    trial: TrialName | None = None
    """As in `Step`."""
    trial_step: int | None = Field(None, ge=0)


class Checkpointed(Strict):
    type: Literal["checkpointed"] = "checkpointed"
    step: int
    path: str
    """Absolute; a folder with a manifest, complete when this is said."""
    manifest_sha256: Sha256
    size_bytes: int


class Notice(Strict):
    """A line worth reading: rows left out, a default chosen, a checkpoint refused."""

    type: Literal["notice"] = "notice"
    level: Literal["info", "warning", "error"] = "info"
    code: str = Field(max_length=64)
    message: str = Field(max_length=4000)
    detail: dict[str, Any] = {}


class Finished(Strict):
    type: Literal["finished"] = "finished"
    step: int
    artifact: str
    """Absolute; a folder with a manifest."""
    manifest_sha256: Sha256
    metrics: dict[MetricName, float] = Field({}, max_length=64)
    """Of the result as a whole: what it is against the model it began as."""
    detail: dict[str, Any] = {}


class Stopped(Strict):
    """The answer to SIGTERM."""

    type: Literal["stopped"] = "stopped"
    step: int


class Failed(Strict):
    type: Literal["failed"] = "failed"
    failure_class: FailureClass
    message: str = Field(max_length=8000)
    hint: str = Field("", max_length=2000)


TrainerEvent = Annotated[
    Started
    | Replanned
    | Probed
    | Step
    | Evaluated
    | Checkpointed
    | Notice
    | Finished
    | Stopped
    | Failed,
    Field(discriminator="type"),
]

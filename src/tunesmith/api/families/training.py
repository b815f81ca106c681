"""The training contract: /train/sft, /jobs; it translates and decides nothing."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.strict import StrictRoute
from tunesmith.errors import BadRequestError
from tunesmith.hub.asked import Request as SubmitRequest
from tunesmith.spec.records import Job, JobState, StopMode
from tunesmith.spec.strict import Name
from tunesmith.spec.train import MAX_LENGTH_LIMIT, Lora, Optim, Run, Sft, Target

router = APIRouter(tags=["training"], route_class=StrictRoute, dependencies=[Depends(caller)])

Status = Literal["pending", "running", "completed", "failed", "cancelled"]
WORDS: dict[JobState, Status] = {
    JobState.QUEUED: "pending",
    JobState.PAUSED: "pending",
    JobState.STARTING: "running",
    JobState.RUNNING: "running",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
JobIdText = Annotated[
    str,
    Path(
        description="8 hex digits; `job-…` and `ftjob-…` name the same job",
        max_length=64,
        examples=["a1b2c3d4"],
    ),
]


class SftRequest(BaseModel):
    """What to train, on what, and how. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model_name: Name = Field(
        description="a local folder (a full model, or a LoRA adapter made by an earlier job), "
        "a registered name, or a hub id",
        examples=["gpt2"],
    )
    dataset_path: Name = Field(
        description="a .json array or a .jsonl file, in the workspace or uploaded",
        examples=["data/my_dataset.json"],
    )
    output_dir: Name | None = Field(
        None, description="where the trained model goes; outputs/<job_id> where left out"
    )
    num_epochs: float = Field(3, gt=0, le=10_000, description="passes over the data")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="optimizer steps; may end before num_epochs",
    )
    batch_size: int = Field(4, ge=1, le=65_536, description="samples per device and step")
    learning_rate: float = Field(2e-5, gt=0, le=10, description="the peak of the schedule")
    use_lora: bool = Field(True, description="train low-rank adapters; false trains every weight")
    max_length: int = Field(
        1024,
        ge=8,
        le=MAX_LENGTH_LIMIT,
        description="tokens of a sample; the model's own context holds where it is shorter",
    )
    overlong: Literal["drop", "truncate", "refuse"] = Field(
        "drop", description="what becomes of a longer sample; it is counted and reported always"
    )
    train_on: Literal["completions", "all"] = Field(
        "completions", description="learn the answers only, or every token"
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=65_536, description="batches whose gradients make one optimizer step"
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="of shuffling, dropout and new adapters")
    lora_r: int = Field(8, ge=1, le=1024, description="the adapters' rank")
    lora_alpha: float = Field(16, gt=0, le=65_536, description="adapters are scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="before the adapters")
    lora_target_modules: (
        Literal["all-linear"] | Annotated[list[Target], Field(min_length=1, max_length=256)]
    ) = Field("all-linear", description="module names as PEFT takes them, or all linear layers")
    load_in_4bit: bool = Field(False, description="the base in 4 bits (needs a GPU)")
    load_in_8bit: bool = Field(False, description="the base in 8 bits (needs a GPU)")
    eval_dataset_path: Name | None = Field(None, description="held-out data, same formats")
    logging_steps: int = Field(1, ge=1, le=1_000_000, description="steps between reported losses")
    save_steps: int | None = Field(
        None, ge=1, le=100_000_000, description="steps between checkpoints; also every minute"
    )
    resume_from: Name | None = Field(
        None, description="a checkpoint folder of an earlier job to go on from"
    )
    priority: int = Field(0, ge=-1000, le=1000, description="higher goes first, then older")
    suffix: str | None = Field(
        None, max_length=64, pattern=r"^[\w.\-]+$", description="part of the tuned model's name"
    )

    def to_spec(self) -> Sft:
        if self.load_in_4bit and self.load_in_8bit:
            raise BadRequestError("load_in_4bit and load_in_8bit exclude each other")
        targets = self.lora_target_modules
        lora = Lora(
            rank=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=targets if isinstance(targets, str) else tuple(targets),
        )
        return Sft(
            model=self.model_name,
            dataset=self.dataset_path,
            eval_dataset=self.eval_dataset_path,
            max_length=self.max_length,
            overlong=self.overlong,
            train_on=self.train_on,
            lora=lora if self.use_lora else None,
            optim=self._optim(),
            run=self._run(),
        )

    def _optim(self) -> Optim:
        return Optim(
            learning_rate=self.learning_rate,
            epochs=self.num_epochs,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            scheduler=self.lr_scheduler,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )

    def _run(self) -> Run:
        bits: Literal["4bit", "8bit"] | None = "8bit" if self.load_in_8bit else None
        return Run(
            quantization="4bit" if self.load_in_4bit else bits,
            logging_steps=self.logging_steps,
            save_steps=self.save_steps,
        )


class Created(BaseModel):
    job_id: str = Field(description="8 hex digits", examples=["a1b2c3d4"])
    status: Status = Field(description="pending: made, not started")
    message: str = Field(description="for a person", examples=["SFT training job created"])


class JobView(BaseModel):
    """One job. Times are UTC, ISO 8601, to the second."""

    job_id: str = Field(description="8 hex digits")
    training_type: str = Field(description="sft, dpo, else the method's name")
    status: Status = Field(description="pending, running, completed, failed or cancelled")
    config: dict[str, Any] = Field(description="the request, with its defaults filled in")
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
    attempts: int = Field(description="how often it was started")
    checkpoint_step: int | None = Field(description="the newest whole checkpoint")


class Logs(BaseModel):
    job_id: str = Field(description="8 hex digits")
    logs: list[str] = Field(description="the last lines, oldest first")
    total_lines: int = Field(description="lines in the file")


class Cancelled(BaseModel):
    job_id: str = Field(description="8 hex digits")
    status: Status = Field(description="cancelled")
    message: str = Field(description="for a person")


IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=255,
        description="sent again with the same body, it brings the first answer and no second job",
    ),
]


@router.post("/train/sft", summary="Start a supervised fine-tuning job")
async def train_sft(
    request: SftRequest, hub: HubDep, who: Caller, idempotency_key: IdempotencyKey = None
) -> Created:
    asked = SubmitRequest(
        spec=request.to_spec(),
        output_dir=request.output_dir,
        request=request.model_dump(mode="json"),
        priority=request.priority,
        label=request.suffix,
        resume_from=request.resume_from,
        idempotency_key=idempotency_key,
        route="/train/sft",
        field_names={
            "model": "model_name",
            "dataset": "dataset_path",
            "eval_dataset": "eval_dataset_path",
        },
    )
    job = await hub.submit(asked, who)
    return Created(job_id=job.id, status="pending", message="SFT training job created")


@router.get("/jobs", summary="List jobs, newest first")
def list_jobs(
    hub: HubDep,
    who: Caller,
    status: Annotated[Status | None, Query(description="only these")] = None,
    limit: Annotated[int | None, Query(ge=1, le=100_000, description="at most so many")] = None,
    offset: Annotated[int, Query(ge=0, le=10**9, description="leave out the first")] = 0,
) -> list[JobView]:
    if status is None:
        return [_shown(hub, job) for job in hub.list_jobs(who, limit=limit, offset=offset)]
    states = [state for state in JobState if _may_mean(state, status)]
    found = [job for job in hub.list_jobs(who, states) if _word(job) == status]
    end = None if limit is None else offset + limit
    return [_shown(hub, job) for job in found[offset:end]]


@router.get("/jobs/{job_id}", summary="One job, with its progress")
def get_job(job_id: JobIdText, hub: HubDep, who: Caller) -> JobDetail:
    job = hub.job(job_id, who)
    return JobDetail(
        **_shown(hub, job).model_dump(),
        progress=job.progress,
        metrics=job.metrics,
        eta_seconds=job.eta_seconds,
        state=job.state,
        attempts=job.attempts,
        checkpoint_step=job.checkpoint_step,
    )


@router.get("/jobs/{job_id}/logs", summary="The end of a job's log")
def get_logs(
    job_id: JobIdText,
    hub: HubDep,
    who: Caller,
    tail: Annotated[int, Query(ge=0, le=10**9, description="lines; 0 for all")] = 100,
) -> Logs:
    job = hub.job(job_id, who)
    lines, total = hub.log_tail(job, tail)
    return Logs(job_id=job.id, logs=lines, total_lines=total)


@router.post("/jobs/{job_id}/cancel", summary="Stop a job")
async def cancel_job(
    job_id: JobIdText,
    hub: HubDep,
    who: Caller,
    force: Annotated[bool, Query(description="kill at once, without a checkpoint")] = False,
) -> Cancelled:
    mode = StopMode.FORCE if force else StopMode.CANCEL
    job = await hub.stop(job_id, mode, who)
    ended = job.state is JobState.CANCELLED
    message = "job cancelled" if ended else "the job stops at its next step, after a checkpoint"
    return Cancelled(job_id=job.id, status="cancelled", message=message)


def _word(job: Job) -> Status:
    if job.state is JobState.STOPPING:
        return "running" if job.stop_mode is StopMode.PAUSE else "cancelled"
    return WORDS[job.state]


def _may_mean(state: JobState, status: Status) -> bool:
    if state is JobState.STOPPING:
        return status in ("running", "cancelled")
    return WORDS[state] == status


def _shown(hub: HubDep, job: Job) -> JobView:
    error = job.error if not (job.error and job.hint) else f"{job.error} ({job.hint})"
    return JobView(
        job_id=job.id,
        training_type=job.spec.method,
        status=_word(job),
        config=job.request,
        created_at=_stamp(job.created_at) or "",
        started_at=_stamp(job.started_at),
        completed_at=_stamp(job.finished_at),
        error=error,
        error_message=error,
        log_file=hub.relative(hub.log_path(job.id)),
        output_dir=hub.relative(job.output_dir),
        fine_tuned_model=hub.tuned_name(job),
    )


def _stamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")

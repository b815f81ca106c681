"""The training contract: /train/sft, /jobs; it translates and decides nothing."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.direct import DirectRoute
from tunesmith.api.families.shown import MEANT, JobDetail, JobView, Status, as_json, shown
from tunesmith.api.strict import StrictRoute
from tunesmith.errors import BadRequestError
from tunesmith.hub.asked import Request as SubmitRequest
from tunesmith.spec.records import JobState, StopMode
from tunesmith.spec.strict import Name
from tunesmith.spec.train import MAX_LENGTH_LIMIT, Columns, Lora, Optim, Run, Sft, Target
from tunesmith.store.listing import line_of

router = APIRouter(tags=["training"], route_class=StrictRoute, dependencies=[Depends(caller)])

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
        description="a .json array, a .jsonl, .csv, .tsv or .parquet file, in the workspace or "
        "uploaded",
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
    devices: int = Field(
        1, ge=1, le=1024, description="GPUs that share each step (on a CPU: processes)"
    )
    eval_dataset_path: Name | None = Field(None, description="held-out data, same formats")
    columns: Columns = Field(
        {},
        description="field of a format → column of the files, mapped by hand; other columns are "
        "then ignored",
        examples=[{"instruction": "question", "output": "answer"}],
    )
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
            columns=self.columns,
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
            devices=self.devices,
            logging_steps=self.logging_steps,
            save_steps=self.save_steps,
        )


class Created(BaseModel):
    job_id: str = Field(description="8 hex digits", examples=["a1b2c3d4"])
    status: Status = Field(description="pending: made, not started")
    message: str = Field(description="for a person", examples=["SFT training job created"])


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


async def train_sft(
    request: SftRequest, hub: HubDep, who: Caller, idempotency_key: IdempotencyKey = None
) -> Response:
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
    answer = Created(job_id=job.id, status="pending", message="SFT training job created")
    return Response(answer.model_dump_json(), media_type="application/json")


router.add_api_route(
    "/train/sft",
    train_sft,
    methods=["POST"],
    summary="Start a supervised fine-tuning job",
    response_model=Created,
    route_class_override=DirectRoute,
)


@router.get("/jobs", summary="List jobs, newest first", response_model=list[JobView])
def list_jobs(
    hub: HubDep,
    who: Caller,
    status: Annotated[Status | None, Query(description="only these")] = None,
    limit: Annotated[int | None, Query(ge=1, le=100_000, description="at most so many")] = None,
    offset: Annotated[int, Query(ge=0, le=10**9, description="leave out the first")] = 0,
) -> Response:
    found = hub.lines(who, None if status is None else MEANT[status], limit, offset)
    return Response(as_json(hub, found), media_type="application/json")


@router.get("/jobs/{job_id}", summary="One job, with its progress")
def get_job(job_id: JobIdText, hub: HubDep, who: Caller) -> JobDetail:
    job = hub.job(job_id, who)
    return JobDetail(
        **shown(hub, line_of(job)),
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

"""The training contract: /train/sft, /train/dpo, /jobs; it translates and decides nothing."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from pydantic import BaseModel, Field

from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.direct import DirectRoute
from tunesmith.api.families.requests import DpoRequest, SftRequest
from tunesmith.api.families.shown import MEANT, JobDetail, JobView, Status, as_json, shown
from tunesmith.api.strict import StrictRoute
from tunesmith.hub import Hub
from tunesmith.hub.asked import Request as SubmitRequest
from tunesmith.hub.principal import Principal
from tunesmith.hub.trials import table_of
from tunesmith.spec.estimate import Estimate
from tunesmith.spec.records import JobState, StopMode
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
    return await _submit(request, "sft", hub, who, idempotency_key)


async def train_dpo(
    request: DpoRequest, hub: HubDep, who: Caller, idempotency_key: IdempotencyKey = None
) -> Response:
    return await _submit(request, "dpo", hub, who, idempotency_key)


def _asked(request: SftRequest | DpoRequest, kind: str, key: str | None = None) -> SubmitRequest:
    return SubmitRequest(
        spec=request.to_spec(),
        output_dir=request.output_dir,
        request=request.model_dump(mode="json"),
        priority=request.priority,
        label=request.suffix,
        resume_from=request.resume_from,
        idempotency_key=key,
        route=f"/train/{kind}",
        field_names={
            "model": "model_name",
            "dataset": "dataset_path",
            "eval_dataset": "eval_dataset_path",
        },
    )


async def _submit(
    request: SftRequest | DpoRequest, kind: str, hub: Hub, who: Principal, key: str | None
) -> Response:
    job = await hub.submit(_asked(request, kind, key), who)
    message = f"{kind.upper()} training job created"
    answer = Created(job_id=job.id, status="pending", message=message)
    return Response(answer.model_dump_json(), media_type="application/json")


router.add_api_route(
    "/train/sft",
    train_sft,
    methods=["POST"],
    summary="Start a supervised fine-tuning job",
    response_model=Created,
    route_class_override=DirectRoute,
)


router.add_api_route(
    "/train/dpo",
    train_dpo,
    methods=["POST"],
    summary="Start preference training on pairs",
    response_model=Created,
    route_class_override=DirectRoute,
)


@router.post("/train/sft/estimate", summary="What a supervised fine-tuning job would take")
async def estimate_sft(request: SftRequest, hub: HubDep, who: Caller) -> Estimate:
    """The body is that of /train/sft; nothing is started."""
    return await hub.estimate(_asked(request, "sft"), who)


@router.post("/train/dpo/estimate", summary="What preference training on pairs would take")
async def estimate_dpo(request: DpoRequest, hub: HubDep, who: Caller) -> Estimate:
    """The body is that of /train/dpo; nothing is started."""
    return await hub.estimate(_asked(request, "dpo"), who)


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
        sweep=table_of(job.artifact),
        attempts=job.attempts,
        checkpoint_step=job.checkpoint_step,
        estimate=hub.estimate_of(job),
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

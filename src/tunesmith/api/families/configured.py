"""Jobs from a configuration's file, of any method: POST /train/config."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.families.training import Created, IdempotencyKey
from tunesmith.api.strict import StrictRoute
from tunesmith.hub import Hub
from tunesmith.hub.asked import Request as SubmitRequest
from tunesmith.spec import written, yaml_guard
from tunesmith.spec.configuration import Configuration
from tunesmith.spec.strict import Name
from tuning_sdk.errors import error_for

ROUTE = "/train/config"
_NAMED = (
    *("model", "dataset", "eval_dataset", "rewards", "tokenizer", "output_dir"),
    "max_completion_length",
)
_SCHEMA = {
    "schema": {
        "type": "string",
        "maxLength": yaml_guard.MAX_BYTES,
        "description": "a mapping with `task_type` (sft, rl, lora, pretrain) and that task's keys, "
        "or with `method` and a specification's fields",
    }
}
KINDS = ("application/yaml", "application/x-yaml", "text/yaml", "application/json")
_BODY = {"requestBody": {"required": True, "content": dict.fromkeys(KINDS, _SCHEMA)}}


class ConfigRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return hub.settings.max_yaml_bytes


router = APIRouter(tags=["training"], route_class=ConfigRoute, dependencies=[Depends(caller)])


@router.post(ROUTE, summary="Start a job from a YAML or JSON configuration", openapi_extra=_BODY)
async def train_config(
    request: Request,
    hub: HubDep,
    who: Caller,
    idempotency_key: IdempotencyKey = None,
    priority: Annotated[
        int, Query(ge=-1000, le=1000, description="higher goes first, then older")
    ] = 0,
    suffix: Annotated[
        str | None,
        Query(max_length=64, pattern=r"^[\w.\-]+$", description="part of the tuned model's name"),
    ] = None,
    resume_from: Annotated[
        Name | None, Query(description="a checkpoint folder of an earlier job to go on from")
    ] = None,
) -> Created:
    """The same file as `tunesmith train` takes; paths are the workspace's. 422 names line, key and
    what would be right."""
    _check_kind(request)
    found = await asyncio.to_thread(written.parse, await request.body())
    asked = SubmitRequest(
        spec=found.spec,
        output_dir=found.output_dir,
        request=found.asked,
        priority=priority,
        label=suffix,
        resume_from=resume_from,
        idempotency_key=idempotency_key,
        route=ROUTE,
        field_names=_names(found),
    )
    job = await hub.submit(asked, who)
    message = f"{found.spec.method.upper()} training job created"
    return Created(job_id=job.id, status="pending", message=message)


def _names(found: Configuration) -> dict[str, str]:
    return {place: found.name(place) for place in _NAMED}


def _check_kind(request: Request) -> None:
    """A page of another origin may send plain text and forms unasked: they are not read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in KINDS:
        raise error_for(415, f"send the configuration with Content-Type: {KINDS[0]}")

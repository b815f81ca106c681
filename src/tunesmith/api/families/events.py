"""A job's events as they happen, for any contract's job: GET /jobs/{job_id}/events."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request

from tunesmith.api import stream
from tunesmith.api.auth import Caller, caller
from tunesmith.api.deps import HubDep
from tunesmith.api.families.training import JobIdText

router = APIRouter(tags=["events"], dependencies=[Depends(caller)])


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job: server-sent events, from the first one to the last",
    status_code=200,  # the document's maker asks the response class otherwise, and finds none
    response_class=stream.EventStream,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def follow_job(
    job_id: JobIdText,
    request: Request,
    hub: HubDep,
    who: Caller,
    last_event_id: Annotated[str | None, Header(description="go on after this `id:`")] = None,
    after: Annotated[str | None, Query(max_length=32, description="as Last-Event-ID")] = None,
) -> stream.EventStream:
    job = hub.job(job_id, who)
    seq = min(stream.last_event_id(last_event_id or after), job.last_seq)
    events = stream.follow(hub, request.app.state.watcher, job.id, seq)
    return stream.EventStream(stream.frames(events, stream.as_frame))

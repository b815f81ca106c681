"""A job's events as they happen, for any contract's job: GET /jobs/{job_id}/events."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from tunesmith.api.auth import Caller, caller, presented_key
from tunesmith.api.deps import HubDep
from tunesmith.api.families.training import JobIdText
from tunesmith.api.feed import Feeds
from tunesmith.api.frames import starting_point
from tunesmith.api.stream import EventStream
from tunesmith.hub import Hub
from tunesmith.hub.principal import Principal
from tunesmith.store import history

router = APIRouter(tags=["events"], dependencies=[Depends(caller)])
PATH = "/jobs/{job_id}/events"


@router.get(
    PATH,
    summary="Follow a job: server-sent events, from the first one to the last",
    status_code=200,  # the document's maker asks the response class otherwise, and finds none
    response_class=EventStream,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def follow_job(
    job_id: JobIdText,
    request: Request,
    hub: HubDep,
    who: Caller,
    last_event_id: Annotated[str | None, Header(description="go on after this `id:`")] = None,
    after: Annotated[str | None, Query(max_length=32, description="as Last-Event-ID")] = None,
) -> EventStream:
    """An `id:` is an event's number and its job. One that is no longer there, or never was, is
    answered with an event `reset`, which tells how the job stands, and then with the oldest event
    that is kept. `server_closing` asks to come back: another server goes on."""
    snapshot = await asyncio.to_thread(_standing, hub, job_id, who)
    first, seq = starting_point(last_event_id or after, snapshot)
    feeds: Feeds = request.app.state.feeds
    reader = feeds.join(
        snapshot["job_id"],
        snapshot["last_seq"],
        presented_key(request) or "",
        lambda: caller(request, hub),
    )
    return EventStream(reader.read(seq, first), reader.leave, hub.settings.stream_send_seconds)


@router.api_route(PATH, methods=["HEAD", "OPTIONS"], include_in_schema=False)
def describe(job_id: JobIdText, request: Request, hub: HubDep, who: Caller) -> Response:
    """What GET would answer with, without the stream."""
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})
    hub.job(job_id, who)
    head = Response(media_type=EventStream.media_type, headers={"Cache-Control": "no-store"})
    del head.headers["content-length"]
    return head


def _standing(hub: Hub, job_id: str, who: Principal) -> dict[str, Any]:
    job = hub.job(job_id, who)
    return hub.store.read(lambda tx: history.standing(tx, job.id))

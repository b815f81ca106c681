"""The protocol of the hands: work, reports, ends, engines. See `spec/hands.py`."""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from tunesmith import VERSION
from tunesmith.api.auth import Worker, operator, presented_key, worker
from tunesmith.api.deps import HubDep
from tunesmith.api.stream import Watcher, wait
from tunesmith.api.strict import StrictRoute
from tunesmith.errors import AuthenticationError, BadRequestError, NoSpaceError, NotFoundError
from tunesmith.hub import Hub
from tunesmith.spec.hands import EngineReport, House, Orders, Report, Waiting, WorkAsk, WorkReply
from tunesmith.spec.records import Outcome
from tunesmith.store.claims import check_token, waiting

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = (0.1, 1.0)
"""A back-off that ends, a job that became valid in another process: looked for soon after the
queue was touched, then ever more seldom."""
LAPSED_SECONDS = 0.02
"""After a lapse, so that it is over for certain."""
LEAST_PAUSE_SECONDS = 0.2
MAX_BODY_BYTES = 64 << 20


class WorkersRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return MAX_BODY_BYTES


router = APIRouter(
    prefix="/internal/v1", tags=["workers"], route_class=WorkersRoute, include_in_schema=False
)
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{8}$")]
Fence = Annotated[int, Path(ge=1, le=2**31)]


async def attempt_token(request: Request, hub: HubDep) -> str:
    """The token that the attempt of this path was given; the store holds its digest."""
    token = presented_key(request)
    job_id, fence = request.path_params["job_id"], request.path_params["fence"]
    if token is None:
        raise AuthenticationError("an attempt's token is wanted")
    if not re.fullmatch(r"[0-9a-f]{8}/[1-9][0-9]{0,8}", f"{job_id}/{fence}"):
        raise NotFoundError("no such attempt")
    hub.store.read(lambda tx: check_token(tx, job_id, int(fence), token))
    return token


AttemptToken = Annotated[str, Depends(attempt_token)]


@router.get("/house", dependencies=[Depends(worker)])
def house(hub: HubDep) -> House:
    """For a worker's first look: whether this is its API, and speaks as it does."""
    return House(version=VERSION)


@router.post("/work", dependencies=[Depends(worker)])
async def work(ask: WorkAsk, request: Request, who: Worker, hub: HubDep) -> WorkReply:
    """Wait until there is something for this worker, or its patience ends."""
    if who.is_worker:  # what a worker's key says of where it is, opens no more than the key does
        ask = ask.model_copy(update={"house_id": ask.house_id or "", "network": ""})
    watcher: Watcher = request.app.state.watcher
    patience = time.monotonic() + ask.wait_seconds
    if await request.is_disconnected():  # the word of a worker that has ended is worth nothing
        return WorkReply()
    await hub.hands.greet(ask)
    with watcher.watch("queue", "engines", f"worker:{ask.worker_id}") as touched:
        soon, late = LOOK_AGAIN_SECONDS
        pause = soon
        while not await request.is_disconnected():  # or a job would be given to nobody
            if watcher.is_closing:
                break
            touched.clear()
            reply = await hub.hands.work_for(ask)
            left = patience - time.monotonic()
            if reply is not None or left <= 0:
                return reply or WorkReply()
            is_touched = await wait(touched, min(left, pause))
            pause = soon if is_touched else min(2 * pause, late)
    return WorkReply()


@router.get("/waiting", dependencies=[Depends(worker)])
def list_waiting(hub: HubDep) -> Waiting:
    """For a dispatcher: the head of the queue."""
    return Waiting(jobs=tuple(hub.store.read(waiting)))


@router.post("/attempts/{job_id}/{fence}/report", dependencies=[Depends(attempt_token)])
async def report(
    job_id: JobId, fence: Fence, body: Report, token: AttemptToken, hub: HubDep
) -> Orders:
    return await hub.hands.report(job_id, fence, token, body)


@router.post("/attempts/{job_id}/{fence}/finish", dependencies=[Depends(attempt_token)])
async def finish(
    job_id: JobId, fence: Fence, body: Outcome, token: AttemptToken, hub: HubDep
) -> Orders:
    return await hub.hands.finish(job_id, fence, token, body)


@router.post("/engines/{engine_id}", dependencies=[Depends(operator)], status_code=204)
async def engine(
    engine_id: Annotated[str, Path(max_length=64)], body: EngineReport, hub: HubDep
) -> Response:
    if body.id != engine_id:
        raise BadRequestError("id: the engine's id differs from the one in the path", param="id")
    await hub.engines.reported(body)
    return Response(status_code=204)


async def keep_house(hub: Hub) -> None:
    """Lapsed leases, stops past their deadline, unused engines: looked at every few seconds.

    A turn that fails, on a full disk for one, is told of, and the next one comes all the same.
    """
    while True:
        if await attempt_to(hub.look_at_disk()):
            await attempt_to(hub.leases.turn())
        await attempt_to(hub.engines.tidy())
        await attempt_to(hub.depot.tidy())
        await asyncio.sleep(_pause(hub))


def _pause(hub: Hub) -> float:
    """Until the next turn; one is not later than the next lapse, so that it need not wait."""
    lapse = max(hub.leases.next_seconds + LAPSED_SECONDS, LEAST_PAUSE_SECONDS)
    return min(hub.settings.reaper_seconds, lapse)


async def attempt_to(work: Awaitable[object]) -> bool:
    """Do it; a failure is told of, and nothing stops. Whether it was done."""
    try:
        await work
    except NoSpaceError as full:
        log.error("a turn of keeping house failed: %s", full)
        return False
    except Exception:
        log.exception("a turn of keeping house failed")
        return False
    return True

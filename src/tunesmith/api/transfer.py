"""Bytes between the API and workers on other hosts. See `spec/transfer.py`."""

import asyncio
import base64
import re
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse

from tunesmith.api.deps import HubDep
from tunesmith.api.strict import StrictRoute
from tunesmith.api.workers import Fence, JobId, WorkersRoute, attempt_token
from tunesmith.errors import BadRequestError
from tunesmith.hub import Hub
from tunesmith.spec.transfer import (
    DIGEST_HEADER,
    MAX_LOG_BYTES,
    MAX_PIECES,
    PIECE_BYTES,
    Committed,
    InputListing,
    LogTaken,
    Offer,
    RemoteFolder,
    UploadPlan,
)

_AT_ONCE = 1 << 20
"""Bytes gathered before they go to the disk."""


class PieceRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return PIECE_BYTES


class LogRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return MAX_LOG_BYTES


def _router(route_class: type[StrictRoute]) -> APIRouter:
    return APIRouter(
        prefix="/internal/v1/attempts/{job_id}/{fence}",
        tags=["workers"],
        route_class=route_class,
        include_in_schema=False,
        dependencies=[Depends(attempt_token)],
    )


_words, _pieces, _logs = _router(WorkersRoute), _router(PieceRoute), _router(LogRoute)
Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


@_words.get("/inputs")
async def inputs(job_id: JobId, fence: Fence, hub: HubDep) -> InputListing:
    return await asyncio.to_thread(hub.depot.inputs, job_id, fence)


@_words.get("/checkpoints/{sha256}")
async def checkpoint(job_id: JobId, fence: Fence, sha256: Sha256, hub: HubDep) -> RemoteFolder:
    return await asyncio.to_thread(hub.depot.checkpoint, job_id, fence, sha256)


@_words.get("/files/{sha256}", response_class=FileResponse)
async def file(job_id: JobId, fence: Fence, sha256: Sha256, hub: HubDep) -> FileResponse:
    place = await asyncio.to_thread(hub.depot.file, job_id, fence, sha256)
    return FileResponse(place, media_type="application/octet-stream")


@_words.post("/uploads")
async def offer(job_id: JobId, fence: Fence, body: Offer, hub: HubDep) -> UploadPlan:
    return await asyncio.to_thread(hub.depot.offer, job_id, fence, body)


@_words.post("/uploads/{sha256}/commit")
async def commit(job_id: JobId, fence: Fence, sha256: Sha256, hub: HubDep) -> Committed:
    return await asyncio.to_thread(hub.depot.commit, job_id, fence, sha256)


@_pieces.put("/uploads/{sha256}/{index}", status_code=204)
async def piece(
    job_id: JobId,
    fence: Fence,
    sha256: Sha256,
    index: Annotated[int, Path(ge=0, le=MAX_PIECES)],
    request: Request,
    hub: HubDep,
) -> Response:
    digest = _digest(request.headers.get(DIGEST_HEADER, ""))
    coming = await asyncio.to_thread(hub.depot.receive, job_id, fence, sha256, index)
    with coming:
        gathered = bytearray()
        async for block in request.stream():
            gathered += block
            if len(gathered) >= _AT_ONCE:
                await asyncio.to_thread(coming.write, bytes(gathered))
                gathered.clear()
        await asyncio.to_thread(coming.write, bytes(gathered))
        await asyncio.to_thread(coming.commit, digest)
    return Response(status_code=204)


@_logs.post("/log")
async def log(
    job_id: JobId,
    fence: Fence,
    offset: Annotated[int, Query(ge=0, le=1 << 53)],
    request: Request,
    hub: HubDep,
) -> LogTaken:
    body = await request.body()
    taken = await asyncio.to_thread(hub.depot.take_log, job_id, fence, offset, body)
    return LogTaken(offset=taken)


def _digest(header: str) -> str:
    """As hexadecimal digits. Raises BadRequestError."""
    found = re.fullmatch(r"sha-256=:([A-Za-z0-9+/]{43}=):", header)
    if found is None:
        raise BadRequestError(f"{DIGEST_HEADER}: sha-256=:<base64>: of the piece is wanted")
    return base64.b64decode(found[1]).hex()


router = APIRouter()
for part in (_words, _pieces, _logs):
    router.include_router(part)

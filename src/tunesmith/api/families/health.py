"""Open to anyone: the server's greeting and its health, for two contracts at once."""

import time
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from tunesmith import VERSION
from tunesmith.api.auth import anyone
from tunesmith.api.deps import HubDep

router = APIRouter(tags=["health"], dependencies=[Depends(anyone)])
_STARTED = time.monotonic()


@router.get("/", summary="What this is")
def greet() -> dict[str, str]:
    return {
        "message": "Tunesmith: fine-tuning on your own machines",
        "version": VERSION,
        "docs": "/docs",
    }


@router.get(
    "/health/ready",
    summary="Whether new work is taken now",
    responses={503: {"description": "Not now; `reason` says why"}},
)
def ready(hub: HubDep) -> JSONResponse:
    """For whoever sends requests here, or waits for a start. 503 where new work is refused."""
    reason = hub.trouble()
    if reason is not None:
        return JSONResponse({"ready": False, "reason": reason}, 503, {"Retry-After": "5"})
    return JSONResponse({"ready": True, "reason": None})


@router.get("/health", summary="Whether the server works, and what it is busy with")
def health(hub: HubDep) -> dict[str, Any]:
    active, total = hub.job_counts()
    return {
        "status": "healthy",
        "version": VERSION,
        "uptime": round(time.monotonic() - _STARTED, 3),
        "active_jobs": active,
        "total_jobs": total,
        "workers": hub.hands.living_workers(),
        **hub.engines.health(),
    }

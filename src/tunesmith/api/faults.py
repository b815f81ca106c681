"""Errors as the contracts want them: `{"error": …}` on OpenAI routes, `{"detail": …}` else."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tunesmith.errors import NotReadyError, RateLimitError, TuningAPIError
from tuning_sdk.errors import error_for

log = logging.getLogger(__name__)

ENVELOPED = (
    "/v1/chat",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/webhook_",
    "/internal",
)
"""Path prefixes whose errors are `{"error": {"message", "type", "param", "code"}}`."""
BAD_REQUEST_NOT_422 = (
    "/v1/chat",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/webhook_",
)
DISK_IS_FULL = 28
_MAX_FAULTS = 20


def install(app: FastAPI) -> None:
    app.add_exception_handler(TuningAPIError, _known)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OSError, _system)
    app.add_exception_handler(Exception, _unknown)


def as_response(request: Request, error: TuningAPIError) -> JSONResponse:
    headers = _headers(error)
    if not request.url.path.startswith(ENVELOPED):
        detail: Any = error.details or error.message
        return JSONResponse({"detail": detail}, error.status_code, headers)
    body = {
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
        "code": error.error_code,
    }
    if error.details:
        body["details"] = error.details  # type: ignore[assignment]
    return JSONResponse({"error": body}, error.status_code, headers)


def _headers(error: TuningAPIError) -> dict[str, str]:
    headers = {}
    if isinstance(error, RateLimitError | NotReadyError):
        headers["Retry-After"] = str(int(error.retry_after or 5))
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status_code == 409:
        headers["x-should-retry"] = "false"
    return headers


async def _known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TuningAPIError)
    return as_response(request, error)


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """Where and why, never what was sent: it may be a secret, or no JSON at all."""
    assert isinstance(error, RequestValidationError)
    faults = [
        {
            "loc": [_plain(part) for part in fault["loc"]],
            "msg": _plain(fault["msg"]),
            "type": fault["type"],
        }
        for fault in error.errors()[:_MAX_FAULTS]
    ]
    if not request.url.path.startswith(ENVELOPED):
        return JSONResponse({"detail": faults}, 422)
    first = faults[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    is_bad_request = request.url.path.startswith(BAD_REQUEST_NOT_422)
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    known = error_for(400 if is_bad_request else 422, message)
    known.param = place or None
    return as_response(request, known)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return as_response(request, error_for(error.status_code, str(error.detail)))


async def _system(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno == DISK_IS_FULL:
        message = "the server's disk is full; nothing was kept of this request"
        return as_response(request, error_for(507, message))
    return await _unknown(request, error)


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return as_response(request, error_for(500, "the server failed; its log says more"))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()[:500]
    return value

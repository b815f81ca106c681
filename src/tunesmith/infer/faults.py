"""What went wrong, in OpenAI's one shape for errors."""

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tunesmith.errors import NotFoundError, TuningAPIError
from tunesmith.infer.door import error_response
from tunesmith.infer.streams import ClientGone

log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    app.add_exception_handler(TuningAPIError, _show_error)
    app.add_exception_handler(RequestValidationError, _show_malformed)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(ClientGone, _show_gone)
    app.add_exception_handler(Exception, _show_fault)


async def _show_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TuningAPIError)
    return error_response(error, request.url.path)


async def _show_malformed(request: Request, error: Exception) -> Response:
    """Of a query: where and why, never what was sent."""
    assert isinstance(error, RequestValidationError)
    told = [{name: each[name] for name in ("loc", "msg", "type")} for each in error.errors()]
    return JSONResponse({"detail": told[:20]}, 422)


async def _show_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in the one shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFoundError(f"no route {request.url.path[:200]!r}"))
    shown = TuningAPIError(
        f"{request.method} is not allowed here" if error.status_code == 405 else str(error.detail),
        error.status_code,
        "invalid_request_error",
        "method_not_allowed" if error.status_code == 405 else "http_error",
    )
    return error_response(shown, request.url.path)


async def _show_gone(_: Request, error: Exception) -> Response:
    """Written into the log as 499; nobody reads it."""
    return Response(status_code=499)


async def _show_fault(request: Request, error: Exception) -> Response:
    log.error("request %s failed", request.state.id, exc_info=error)
    return error_response(TuningAPIError("the engine failed; its log has more"), request.url.path)

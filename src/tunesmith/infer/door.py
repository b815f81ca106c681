"""What every request passes: its number, the key, one shape for errors, one line in the log."""

import hmac
import logging
import time
import uuid
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.errors import AuthenticationError, TuningAPIError
from tunesmith.infer import contract

log = logging.getLogger(__name__)
OPEN_PATHS = {"/health"}


class Door:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["id"] = request_id
        began, status = time.monotonic(), 0

        async def send_numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._guarded(scope, receive, send_numbered)
        finally:
            if served := state.get("served"):
                served.let_go()
            if scope["path"] not in OPEN_PATHS:
                _log_line(scope, status, time.monotonic() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key and scope["path"] not in OPEN_PATHS and not self._is_allowed(scope):
            error = AuthenticationError("send the engine's key as Authorization: Bearer <key>")
            await error_response(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        kind, _, sent = Headers(scope=scope).get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(sent.strip().encode(), self._key)
        return kind.lower() == "bearer" and is_right


def error_body(error: TuningAPIError) -> dict[str, Any]:
    shown = {
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
        "code": error.error_code,
    }
    return {"error": shown}


def error_response(error: TuningAPIError, path: str = "") -> JSONResponse:
    """OpenAI's shape, where a 422 of ours is a 400; the inference contract's on its paths."""
    is_contract = path in contract.PATHS
    status = 400 if error.status_code == 422 and not is_contract else error.status_code
    headers = {}
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["retry-after"] = str(max(1, round(retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = {"detail": error.message} if is_contract else error_body(error)
    return JSONResponse(body, status, headers)


def _log_line(scope: Scope, status: int, seconds: float) -> None:
    usage = scope["state"].get("usage")
    log.info(
        "%s %s %s status=%s seconds=%.3f prompt_tokens=%s completion_tokens=%s",
        scope["state"]["id"],
        scope["method"],
        scope["path"].encode("unicode_escape").decode()[:200],
        status or "gone",
        seconds,
        usage.prompt_tokens if usage else 0,
        usage.completion_tokens if usage else 0,
    )

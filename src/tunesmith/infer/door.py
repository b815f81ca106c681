"""What every request passes: its number, key and rate, one shape for errors, a line in the log."""

import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith import journal
from tunesmith.errors import PermissionError, TuningAPIError
from tunesmith.infer import contract, gauges
from tunesmith.infer.keyring import Keyring
from tunesmith.rates import Rates
from tunesmith.spec import scopes

log = logging.getLogger(__name__)
OPEN_PATHS = ("/health", "/docs", "/redoc", "/openapi.json", "/static-offline-docs")
GENERATING = ("/generate", "/chat", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")
LOADING = ("/load_model", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_QUIET = ("/health", "/metrics")
_KNOWN = frozenset((*OPEN_PATHS, *GENERATING, *LOADING, "/metrics", "/model_info", "/v1/models"))
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class Door:
    """ASGI middleware around the whole app."""

    def __init__(
        self, app: ASGIApp, keyring: Keyring, rates: Rates, origins: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._rates = rates
        self._origins = frozenset(origins)

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
                gauges.look(served)
            if scope["path"] not in _QUIET:
                _note(scope, status, began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            if not path.startswith(OPEN_PATHS):
                await self._admit(scope)
        except TuningAPIError as error:
            await error_response(error, path)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        wanted: scopes.Scope = "load" if path in LOADING else "infer"
        holder = self._keyring.admit(headers, wanted)
        if holder is None:
            self._refuse_foreign_page(headers)
        if path in GENERATING:
            client = scope.get("client") or ("unknown", 0)
            await self._rates.spend(holder.name if holder else client[0])

    def _refuse_foreign_page(self, headers: Headers) -> None:
        """Where no key is wanted, any page in a browser of this machine could ask."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return
        told = urlsplit(origin)
        if told.hostname not in _LOCAL and told.netloc != headers.get("host"):
            raise PermissionError(
                f"pages of {origin[:200]!r} may not ask here; TUNESMITH_CORS_ORIGINS lets them"
            )


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


def _note(scope: Scope, status: int, began: float) -> None:
    """One line in the log, and the counts."""
    state, now = scope["state"], time.monotonic()
    usage = state.get("usage")
    prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    route = scope["path"] if scope["path"] in _KNOWN else "other"
    gauges.REQUESTS.labels(route, str(status or "gone")).inc()
    gauges.SECONDS.labels(route).observe(now - began)
    gauges.PROMPT_TOKENS.inc(prompt)
    gauges.COMPLETION_TOKENS.inc(completion)
    journal.tell(
        log,
        {
            "request_id": state["id"],
            "method": scope["method"],
            "path": scope["path"].encode("unicode_escape").decode()[:200],
            "status": status or "gone",
            "seconds": round(now - began, 4),
            "generation_seconds": round(now - state.get("taken", now), 4),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "gpu_memory_bytes": torch.cuda.memory_allocated(),
        },
    )

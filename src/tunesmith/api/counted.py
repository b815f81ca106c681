"""Requests counted for Prometheus, by route and status."""

import time

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUESTS = Counter("tunesmith_http_requests", "Requests answered", ["method", "route", "status"])
SECONDS = Histogram("tunesmith_http_request_seconds", "To the first byte of the answer", ["route"])
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


class Counted:
    """ASGI middleware. A stream counts once it has begun; how long it lasts is the reader's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                REQUESTS.labels(method, route, str(message["status"])).inc()
                SECONDS.labels(route).observe(time.monotonic() - began)
            await send(message)

        await self._app(scope, receive, counting)

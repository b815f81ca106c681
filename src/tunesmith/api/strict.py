"""Requests read strictly: who asks first, then a bounded body, then JSON without surprises."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pydantic_core
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from tunesmith.api.deps import hub_of
from tunesmith.errors import PayloadTooLargeError, TuningAPIError
from tunesmith.hub import Hub
from tuning_sdk.errors import error_for

MAX_MEMBERS = 1000
"""Fields of a body's own object: more would only be listed as unknown, one after the other."""
DRAIN_BYTES = 64 << 20
DRAIN_SECONDS = 5.0
IDLE_SECONDS = 0.2
"""How far a refused body is read on: a client that still sends would not hear the answer."""
NOBODY_LISTENS = 499
Door = Callable[[Request, Hub], Awaitable[object]]


class StrictRequest(Request):
    """A body over `limit` bytes is refused before it is read to its end."""

    limit = 0
    admitted: dict[Door, object]
    """Who was let in, by each door of the route."""

    async def stream(self) -> AsyncGenerator[bytes, None]:
        size = 0
        async for part in super().stream():
            size += len(part)
            if size > self.limit:
                raise _too_large(self.limit)
            yield part

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = read_json(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route that knows its caller before it takes a body in.

    Give a router `route_class=StrictRoute` and one of the doors of `auth` among its dependencies:
    a stranger is refused before a byte of the body is read.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = self.inner_handler()
        doors = [found.dependency for found in self.dependencies if found.dependency]

        async def strictly(request: Request) -> Response:
            hub = hub_of(request)
            coming = _Coming(request.receive)
            strict = StrictRequest(request.scope, coming)
            strict.limit = self.body_limit(hub)
            try:
                strict.admitted = {door: await door(strict, hub) for door in doors}
                refuse_unreadable(strict, strict.limit)
                if self.body_field is not None:
                    await _read(strict)
                return await handler(strict)
            except ClientDisconnect:
                return Response(status_code=NOBODY_LISTENS)
            except (TuningAPIError, RequestValidationError):
                await coming.drain()
                raise

        return strictly

    def inner_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request that was let in and read."""
        return super().get_route_handler()

    def body_limit(self, hub: Hub) -> int:
        """Bytes of a request's body."""
        return hub.settings.max_json_bytes


class _Coming:
    """What the server hands on of a request's body, and whether there is more."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_more = True

    async def __call__(self) -> Message:
        message = await self._receive()
        self._has_more = bool(message.get("more_body", False))
        return message

    async def drain(self) -> None:
        """Read on for a while, keeping nothing."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._has_more and size < DRAIN_BYTES:
                    message = await asyncio.wait_for(self(), IDLE_SECONDS)
                    size += len(message.get("body", b""))


def read_json(body: bytes) -> Any:
    """Raises RequestValidationError: no NaN, no lone surrogate, no bottomless nesting.

    Two readers: one knows no number out of a float's range, the other no depth beyond 200.
    """
    try:
        msgspec.json.decode(body)
        found = pydantic_core.from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise _fault(f"not readable as JSON: {_plain(str(error))}", "json_invalid") from None
    if isinstance(found, dict) and len(found) > MAX_MEMBERS:
        raise _fault(f"over {MAX_MEMBERS} fields", "too_long")
    return found


def refuse_unreadable(request: Request, limit: int) -> None:
    """By its headers: a body that is packed, or said to be over `limit` bytes."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise error_for(415, "a body with a Content-Encoding is not read; send it as it is")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)


async def _read(request: StrictRequest) -> None:
    """Take the JSON in, so that its faults are told as ours."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if body and not (kind.startswith("application/") and kind.endswith(("/json", "+json"))):
        raise _fault("the body must be JSON: send Content-Type: application/json", "json_type")
    if body:
        await request.json()


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is over {limit} bytes, the limit of this route")


def _fault(message: str, kind: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body",), "msg": message, "type": kind}])


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:200]

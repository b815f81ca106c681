"""Requests in flight when the server ends: they get time, and then a clean end."""

import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.api.faults import as_response
from tunesmith.api.stream import abort
from tunesmith.errors import NotReadyError

_FAREWELL_SECONDS = 0.5
_ERROR = {
    "message": "the server is shutting down; ask again in a few seconds",
    "type": "server_error",
    "param": None,
    "code": "server_closing",
}


class InFlight:
    """The requests that are being answered."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[object]] = set()
        self.is_cut = False

    def cut(self) -> None:
        """End them now: one that was not answered yet is refused (503), a stream says why."""
        self.is_cut = True
        for task in self.tasks:
            task.cancel()


@contextlib.contextmanager
def heard(end: Callable[[], None]) -> Iterator[None]:
    """Under a server that is not ours: `end` is called in the loop at SIGTERM and SIGINT, before
    that server waits for streams which would not end by themselves."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def hear(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(end)
        theirs = before[signal.Signals(number)]
        if callable(theirs):
            theirs(number, frame)

    for number, theirs in before.items():
        if callable(theirs):
            signal.signal(number, hear)
    try:
        yield
    finally:
        for number, theirs in before.items():
            if signal.getsignal(number) is hear:
                signal.signal(number, theirs)


class Leaving:
    """Keeps count of requests, and gives those that are cut their end."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        self._in_flight.tasks.add(task)
        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            if not self._in_flight.is_cut:
                raise
            task.uncancel()
            await _end(answer, scope, receive)
        finally:
            self._in_flight.tasks.discard(task)


class _Answer:
    """Sends on, and knows what was begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_begun = False
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_begun = True
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self.is_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        await self._send(message)


async def _end(answer: _Answer, scope: Scope, receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FAREWELL_SECONDS):
            if not answer.is_begun:
                refusal = as_response(Request(scope), NotReadyError(_ERROR["message"] or ""))
                await refusal(scope, receive, answer)
                return
            if answer.is_stream:
                text = f"data: {json.dumps({'error': _ERROR})}\n\n".encode()
                body = {"type": "http.response.body", "body": text, "more_body": False}
                await answer(body)
                return
    await abort(scope)

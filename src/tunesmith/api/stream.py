"""Server-sent events to one reader each: sent as they come, with bounds; and what wakes waiters."""

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tunesmith.store.tables import ALL

SEND_SECONDS = 30.0
"""A reader that takes no byte for so long is dropped; it can come back with Last-Event-ID."""
HIGH_WATER_BYTES = 32 << 10
"""Of a stream's words that wait in this process, beside the one that is being sent."""
UNSENT_BYTES = 64 << 10
"""Of a stream's words that wait in the kernel."""
TRANSPORT = "tunesmith.transport"
"""The ASGI extension by which a response reaches its connection (`protocol.py`)."""
Content = AsyncGenerator[str, None] | AsyncGenerator[bytes, None]


class Watcher:
    """Topics touched by commits, handed from the writer's thread to whoever waits in the loop."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._loop = asyncio.get_running_loop()
        self.is_closing = False

    def close(self) -> None:
        """The server is about to end: wake whoever waits, so that it can leave."""
        self.is_closing = True
        self._wake(frozenset({ALL}))

    def notify(self, topics: frozenset[str]) -> None:
        """Called on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake, topics)

    @contextlib.contextmanager
    def watch(self, *topics: str) -> Iterator[asyncio.Event]:
        """An event set at each commit that touches a topic; clear it before looking."""
        event = asyncio.Event()
        for topic in topics:
            self._waiting[topic].add(event)
        try:
            yield event
        finally:
            for topic in topics:
                self._waiting[topic].discard(event)
                if not self._waiting[topic]:
                    del self._waiting[topic]

    def _wake(self, topics: frozenset[str]) -> None:
        for topic in self._waiting if ALL in topics else topics:
            for event in self._waiting.get(topic, ()):
                event.set()


async def wait(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came in time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


class EventStream(Response):
    """A stream that drops a reader which no longer reads, and ends where its reader leaves."""

    media_type = "text/event-stream"

    def __init__(
        self,
        content: Content,
        close: Callable[[], Awaitable[None]] | None = None,
        send_seconds: float | None = None,
    ) -> None:
        """`close` is called at the end, also where the reader left before the first word."""
        self._content = content
        self._close = close
        self._send_seconds = SEND_SECONDS if send_seconds is None else send_seconds
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        bound(scope, self._send_seconds)
        leaving = asyncio.create_task(until_gone(receive))
        leaving.add_done_callback(lambda left: None if left.cancelled() else serving.cancel())
        try:
            await self._send_all(send)
        except TimeoutError:
            await abort(scope)
        except asyncio.CancelledError:
            if not leaving.done() or serving.uncancel():  # someone else's cancelling
                raise
        finally:
            leaving.cancel()
            if self._close is not None:
                await self._close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._content) as content:
            await self._patiently(send, start)
            async for part in content:
                body = part.encode() if isinstance(part, str) else part
                await self._patiently(send, {**_BODY, "body": body})
        await self._patiently(send, {**_BODY, "more_body": False})

    async def _patiently(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._send_seconds):
            await send(message)


_BODY = {"type": "http.response.body", "body": b"", "more_body": True}


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def bound(scope: Scope, silent_seconds: float) -> None:
    """Let little wait for a slow reader, and let the kernel give up one that is gone."""
    transport = transport_of(scope)
    if transport is None:
        return
    transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
    with contextlib.suppress(OSError, AttributeError):
        connection = transport.get_extra_info("socket")
        for option, value in (
            (socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES),
            (socket.TCP_USER_TIMEOUT, int(silent_seconds * 1000)),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def abort(scope: Scope) -> None:
    """Cut the connection at once: a close would wait for ever until the reader took the rest."""
    transport = transport_of(scope)
    if transport is not None:
        transport.abort()
        await asyncio.sleep(0)  # so that the server knows before this response ends


def transport_of(scope: Scope) -> Any:
    return scope.get("extensions", {}).get(TRANSPORT)

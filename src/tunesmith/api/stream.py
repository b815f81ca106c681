"""Server-sent events: replay from the table, then the tail; one watcher wakes all readers."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tunesmith.hub import Hub
from tunesmith.spec.records import JobEvent

KEEP_ALIVE_SECONDS = 15.0
SEND_SECONDS = 30.0
"""A reader that takes no byte for so long is dropped; it can come back with Last-Event-ID."""
FINAL = {"succeeded", "failed", "cancelled"}


class Watcher:
    """Topics touched by commits, handed from the writer's thread to whoever waits in the loop."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._loop = asyncio.get_running_loop()
        self.is_closing = False

    def close(self) -> None:
        """The server is about to end: wake whoever waits, so that it can leave."""
        self.is_closing = True
        self._wake(frozenset(self._waiting))

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
        for topic in topics:
            for event in self._waiting.get(topic, ()):
                event.set()


async def wait(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came in time."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


async def follow(
    hub: Hub, watcher: Watcher, job_id: str, seq: int
) -> AsyncIterator[JobEvent | None]:
    """Events after `seq` until the job's last one; None when there was nothing for a while.

    Ends before where the server does: the reader comes back with the last id it has seen.
    """
    with watcher.watch(f"job:{job_id}") as touched:
        while not watcher.is_closing:
            touched.clear()
            batch = hub.events_after(job_id, seq)
            for event in batch:
                seq = event.seq
                yield event
            if batch and batch[-1].type in FINAL:
                return
            if not batch:
                if hub.is_over(job_id, seq):
                    return
                if not await wait(touched, KEEP_ALIVE_SECONDS):
                    yield None


async def frames(
    events: AsyncIterator[JobEvent | None], encode: Callable[[JobEvent], str]
) -> AsyncIterator[str]:
    """One frame an event: its seq as `id:`, one line of JSON as `data:`."""
    yield "retry: 1000\n\n"
    async for event in events:
        yield ": keep-alive\n\n" if event is None else f"id: {event.seq}\n{encode(event)}\n\n"


def as_frame(event: JobEvent) -> str:
    body = event.model_dump(mode="json", exclude={"job_id"})
    return f"data: {json.dumps(body, ensure_ascii=False)}"


class EventStream(StreamingResponse):
    """A stream that drops a reader which no longer reads."""

    media_type = "text/event-stream"

    def __init__(
        self, content: AsyncIterator[str], close: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """`close` is called at the end, also where the reader left before the first word."""
        self._close = close
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def impatiently(message: object) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)  # type: ignore[arg-type]

        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await super().__call__(scope, receive, impatiently)
        finally:
            if self._close is not None:
                await self._close()


def last_event_id(text: str | None) -> int:
    """The seq to go on after; 0, the beginning, for whatever is not a number of ours."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 18:
        return 0
    return int(text)

"""Server-sent events, read from an answer while it comes."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx2

MAX_EVENT_BYTES = 8 << 20


@dataclass(frozen=True)
class EventLine:
    name: str
    data: str


def read_events(response: httpx2.Response) -> Iterator[EventLine]:
    """Every whole event; one that the connection cut in two is left out.

    Raises httpx2.TransportError where the connection breaks or an event is over the limit.
    """
    for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
        if event.data:
            yield EventLine(event.event, event.data)


async def read_events_async(response: httpx2.Response) -> AsyncIterator[EventLine]:
    """As `read_events`, awaited."""
    async for event in httpx2.EventSource(response, max_event_size=MAX_EVENT_BYTES):
        if event.data:
            yield EventLine(event.event, event.data)

"""What an engine answers, on its way to whoever asked."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import httpx2

log = logging.getLogger(__name__)

_LOST = (
    b'data: {"error": {"message": "the engine stopped in mid-answer; ask again", '
    b'"type": "server_error", "param": null, "code": "engine_lost"}}\n\n'
)


class Busy(Protocol):
    """Counts the requests that an engine is answering."""

    def let_go(self, engine_id: str) -> None: ...


@dataclass
class Answer:
    """An engine's reply, its body not read yet. Close it, whatever happens."""

    status: int
    headers: dict[str, str]
    response: httpx2.Response = field(repr=False)
    client: "Busy" = field(repr=False)
    engine_id: str = ""
    _is_closed: bool = False

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; a broken engine ends a stream with an error event."""
        try:
            async for part in self.response.aiter_bytes():
                yield part
        except httpx2.HTTPError as error:
            log.error("engine %s broke off: %s", self.engine_id, error)
            if self.is_stream:
                yield _LOST

    async def close(self) -> None:
        """Closing in mid-stream frees the place in the engine. Closed again, nothing happens."""
        if not self._is_closed:
            self._is_closed = True
            self.client.let_go(self.engine_id)
            await self.response.aclose()


@dataclass(frozen=True)
class Target:
    """An engine that is ready, and how to speak to it."""

    engine_id: str
    url: str
    key: str
    base_name: str = ""
    """What it calls the base; empty: as the folder is called."""
    is_ours: bool = True


def bearer(key: str) -> dict[str, str]:
    """Nothing where there is no key: an empty one is no header."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def message(reply: httpx2.Response) -> str:
    """What an engine says of a request that it refuses; its body must have been read."""
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {reply.status_code}"

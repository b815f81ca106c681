"""What an engine answers, on its way to whoever asked."""

import json
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

import httpx2

from tunesmith.hub.hop import Hop, HopError, Wire

log = logging.getLogger(__name__)

LOST = (
    b'data: {"error": {"message": "the engine stopped in mid-answer; ask again", '
    b'"type": "server_error", "param": null, "code": "engine_lost"}}\n\n'
)


class Busy(Protocol):
    """Counts the requests that an engine is answering."""

    hop: Hop

    def let_go(self, engine_id: str) -> None: ...


@dataclass(frozen=True)
class Target:
    """An engine that is ready, and how to speak to it."""

    engine_id: str
    url: str
    key: str
    base_name: str = ""
    """What it calls the base; empty: as the folder is called."""
    is_ours: bool = True


@dataclass
class Answer:
    """An engine's reply: read whole, or a stream. Close it, whatever happens."""

    target: Target
    wire: Wire = field(repr=False)
    engines: Busy = field(repr=False)
    url: str
    body: bytes = b""
    """Of one that is no stream."""
    _is_closed: bool = False

    @property
    def status(self) -> int:
        return self.wire.status

    @property
    def headers(self) -> dict[str, str]:
        """Names in small letters."""
        return self.wire.headers

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def read(self) -> None:
        """Take the body in. Raises HopError: an engine that ends half-way is no answer."""
        parts = [self.wire.take()]
        while not self.wire.is_over:
            await self.wire.wait()
            parts.append(self.wire.take())
        self.body = b"".join(parts)
        if self.wire.error is not None:
            raise self.wire.error

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """A stream as it comes; a broken engine ends it with an error event."""
        try:
            while True:
                if part := self.wire.take():
                    yield part
                elif self.wire.is_over:
                    break
                else:
                    await self.wire.wait()
        except HopError as error:
            self.wire.error = error
        if self.is_broken():
            yield LOST

    def is_broken(self) -> bool:
        """Whether the stream ended before its end; it is logged."""
        if self.wire.error is None:
            return False
        log.error("engine %s broke off: %s", self.target.engine_id, self.wire.error)
        return True

    async def close(self) -> None:
        """Closing in mid-stream frees the place in the engine. Closed again, nothing happens."""
        if not self._is_closed:
            self._is_closed = True
            self.engines.let_go(self.target.engine_id)
            self.engines.hop.give_back(self.url, self.wire)

    def message(self) -> str:
        """What the engine says of a request that it refuses."""
        return _message(self.body, self.status)


def bearer(key: str) -> dict[str, str]:
    """Nothing where there is no key: an empty one is no header."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def message(reply: httpx2.Response) -> str:
    """What it says by the general client; the body must have been read."""
    return _message(reply.content, reply.status_code)


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"

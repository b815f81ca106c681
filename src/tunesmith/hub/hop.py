"""The way to an engine and back: HTTP/1.1 with as little between as there can be.

A token of a stream costs one callback here. What a general client does around each piece costs
several times the relay's own work (`bench/hop.py`).
"""

import asyncio
import ssl
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0
"""Until the first byte, and between two."""
KEPT_BYTES = 256 << 10
"""Of an answer that nobody takes yet: more is left in the kernel."""
_IDLE = 100
Sink = Callable[[bytes], None]


class HopError(Exception):
    """The connection broke, or what came was no HTTP."""


class HopTimeout(HopError):
    """Nothing came for too long."""


class Wire(asyncio.Protocol):
    """One connection to an engine; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_open = False
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.headers: dict[str, str] = {}
        self.status = 0
        self.error: HopError | None = None
        self.is_whole = False
        self._may_stay = False
        self._parts: list[bytes] = []
        self._held = 0
        self._is_paused = False
        self._sink: Sink | None = None
        self.news = asyncio.Event()
        """Set where something came that no sink took, and at the end."""

    @property
    def is_over(self) -> bool:
        return self.is_whole or self.error is not None

    def ask(self, head: bytes, body: bytes) -> None:
        self._begin()
        assert self.transport is not None
        self.transport.write(head + body)

    def pour(self, sink: Sink | None) -> None:
        """Hand what came, and what comes, to `sink` as it comes."""
        self._sink = sink
        if sink is not None and self._parts:
            sink(self.take())

    def take(self) -> bytes:
        """What came and was not taken."""
        taken = b"".join(self._parts)
        self._parts.clear()
        self._held = 0
        self.resume()
        return taken

    def pause(self) -> None:
        if self.transport is not None and not self._is_paused and self.is_open:
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.transport is not None and self._is_paused and self.is_open:
            self._is_paused = False
            self.transport.resume_reading()

    async def wait(self) -> None:
        """Until there is news. Raises HopTimeout."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.news.wait()
        except TimeoutError:
            raise HopTimeout(f"nothing came for {ANSWER_SECONDS:.0f} s") from None
        self.news.clear()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is of no class of asyncio's
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(HopError(f"no HTTP: {error}"))
            self.abort()
            return
        if self._parts and self._sink is not None:
            parts = self._parts
            self._sink(parts[0] if len(parts) == 1 else b"".join(parts))
            parts.clear()
        elif self._parts:
            self.news.set()
            if self._held > KEPT_BYTES:
                self.pause()
        if self.is_whole:
            self.news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        is_framed = "content-length" in self.headers or "transfer-encoding" in self.headers
        if self.status and not is_framed and error is None:  # then the close is the end
            self.is_whole = True
            self.news.set()
        elif not self.is_whole:
            self._end(HopError(str(error or "the connection was closed in mid-answer")))

    def _end(self, error: HopError) -> None:
        self.error = self.error or error
        self.news.set()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.news.set()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        if self._sink is None:
            self._held += len(body)

    def on_message_complete(self) -> None:
        if self.status >= 200:  # 100 Continue is no answer
            self.is_whole = True
            self._may_stay = self._parser.should_keep_alive()  # forgotten right after

    @property
    def may_stay(self) -> bool:
        """Whether another request can go this way."""
        return self.is_open and self.is_whole and self._may_stay


class Hop:
    """Connections to engines, kept while they are good."""

    def __init__(self) -> None:
        self._idle: defaultdict[tuple[str, int, bool], list[Wire]] = defaultdict(list)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Wire:
        """Ask, and wait for the answer's head. Raises HopError, HopTimeout."""
        host, port, path, is_tls = _parts_of(url)
        wire = await self._wire((host, port, is_tls))
        told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
            f"accept-encoding: identity\r\ncontent-length: {len(body)}\r\n{told}\r\n"
        )
        wire.ask(head.encode("latin-1"), body)
        try:
            while not wire.status or wire.status < 200:
                if wire.error is not None:
                    raise wire.error
                await wire.wait()
        except BaseException:
            wire.abort()
            raise
        return wire

    def give_back(self, url: str, wire: Wire) -> None:
        """After its answer; one that is not over is cut off."""
        host, port, _, is_tls = _parts_of(url)
        idle = self._idle[host, port, is_tls]
        if wire.may_stay and len(idle) < _IDLE:
            wire.pour(None)
            idle.append(wire)
        else:
            wire.abort()

    def close(self) -> None:
        for idle in self._idle.values():
            for wire in idle:
                wire.abort()
        self._idle.clear()

    async def _wire(self, place: tuple[str, int, bool]) -> Wire:
        idle = self._idle[place]
        while idle:
            wire = idle.pop()
            if wire.is_open:
                return wire
        host, port, is_tls = place
        context = ssl.create_default_context() if is_tls else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, wire = await loop.create_connection(Wire, host, port, ssl=context)
        except (OSError, TimeoutError) as error:
            raise HopError(f"{host}:{port} cannot be reached: {error}") from None
        return wire


@lru_cache(maxsize=256)
def _parts_of(url: str) -> tuple[str, int, str, bool]:
    told = urlsplit(url)
    is_tls = told.scheme == "https"
    return told.hostname or "", told.port or (443 if is_tls else 80), told.path or "/", is_tls

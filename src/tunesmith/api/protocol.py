"""HTTP/1 as uvicorn speaks it, with what it leaves out: a bound on headers, the way from a response
to its connection, bodies without a length for HTTP/1.0."""

import asyncio
from typing import Any

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tunesmith.api.descriptors import BUSY
from tunesmith.api.stream import TRANSPORT

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, beside what came with the first packet."""


class Protocol(HttpToolsProtocol):
    _is_in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self.config.limit_concurrency
        if most is not None and len(self.connections) >= most:
            transport.write(BUSY)
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The headers are too large.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0
        self.scope["extensions"] = {TRANSPORT: self.transport}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before and self.scope["http_version"] == "1.0":
            self.cycle.send = _Unchunked(self.cycle)  # type: ignore[method-assign]


class _Unchunked:
    """Sends a body of unknown length as it is: it goes on until the connection is closed.

    uvicorn would send chunks, which HTTP/1.0 does not know (RFC 9112, section 6.1).
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._has_length = False

    async def __call__(self, message: Any) -> None:
        self._prepare(message)
        await RequestResponseCycle.send(self._cycle, message)

    def _prepare(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            self._has_length = b"content-length" in names
            if not self._has_length:
                self._cycle.chunked_encoding = False
        elif not self._has_length:
            self._cycle.expected_content_length = len(message.get("body", b""))

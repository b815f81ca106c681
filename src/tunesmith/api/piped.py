"""A stream of an engine's to a client's connection, with nothing between for each token.

Its beginning and its end go the usual way; the pieces between are written as chunks to the
connection itself. A client that takes nothing stops the reading from the engine, and is cut off.
"""

import asyncio

from starlette.types import Receive, Scope, Send

from tunesmith.api.stream import HIGH_WATER_BYTES, SEND_SECONDS, EventStream, transport_of
from tunesmith.hub.answers import LOST, Answer
from tunesmith.hub.hop import HopError

_LOOK_SECONDS = 0.02
"""Between two looks at a connection that is full."""
_ENDED = {"type": "http.response.body", "body": b"", "more_body": False}


class Piped(EventStream):
    def __init__(self, answer: Answer, send_seconds: float = SEND_SECONDS) -> None:
        super().__init__(answer.parts(), answer.close, send_seconds)
        self._answer = answer
        self._connection: asyncio.Transport | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["http_version"] == "1.1":
            self._connection = transport_of(scope)
        await super().__call__(scope, receive, send)

    async def _send_all(self, send: Send) -> None:
        if self._connection is None:
            await super()._send_all(send)
            return
        try:
            await self._pump(self._connection, send)
        finally:
            self._answer.wire.pour(None)

    async def _pump(self, transport: asyncio.Transport, send: Send) -> None:
        """Raises TimeoutError where the client takes nothing."""
        wire = self._answer.wire

        def write(part: bytes) -> None:
            transport.write(b"%x\r\n%b\r\n" % (len(part), part))
            if transport.get_write_buffer_size() > HIGH_WATER_BYTES:
                wire.pause()
                wire.news.set()

        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        wire.pour(write)
        try:
            while not wire.is_over:
                await wire.wait()
                await self._drained(transport)
                wire.resume()
        except HopError as error:
            wire.error = error
        if self._answer.is_broken():
            write(LOST)
        await self._drained(transport)
        await send(_ENDED)

    async def _drained(self, transport: asyncio.Transport) -> None:
        """Until it has room again, patiently."""
        if transport.get_write_buffer_size() <= HIGH_WATER_BYTES:
            return
        left, before = self._send_seconds, transport.get_write_buffer_size()
        while transport.get_write_buffer_size() > HIGH_WATER_BYTES // 2:
            await asyncio.sleep(_LOOK_SECONDS)
            size = transport.get_write_buffer_size()
            left = self._send_seconds if size < before else left - _LOOK_SECONDS
            before = size
            if left < 0:
                raise TimeoutError

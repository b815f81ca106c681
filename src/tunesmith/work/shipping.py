"""A trainer's log on its way to the API: in memory, bounded, by offset, each byte once."""

import asyncio
import base64
import logging

from pydantic import Field

from tunesmith.errors import TuningAPIError
from tunesmith.spec.strict import Strict
from tunesmith.spec.transfer import LogTaken
from tunesmith.work.wire import Unreachable, Wire

log = logging.getLogger(__name__)

MAX_HELD_BYTES = 4 << 20
"""Kept while the API is away; then the middle is left out, and a line says so."""
BATCH_BYTES = 256 << 10
PAUSE_SECONDS = 0.5


class LogRest(Strict):
    """What of a log the API has not got yet."""

    offset: int = Field(ge=0)
    body: str
    """Base64."""

    def bytes(self) -> bytes:
        return base64.b64decode(self.body)


class ShippedLog:
    """Takes a trainer's words at any pace; `ship` carries them."""

    def __init__(self, wire: Wire, path: str, token: str) -> None:
        self._wire, self._path, self._token = wire, f"{path}/log", token
        self._offset = 0
        """Bytes that the API has."""
        self._sent = b""
        """A batch under way: it stays the same until it was taken."""
        self._waiting = bytearray()
        self._dropped = 0
        self._new = asyncio.Event()

    def write(self, block: bytes) -> None:
        self._waiting += block
        if len(self._waiting) > MAX_HELD_BYTES:
            self._drop_middle()
        self._new.set()

    def line(self, text: str) -> None:
        self.write(text.encode("utf-8", "replace") + b"\n")

    def close(self) -> None:
        return

    async def ship(self) -> None:
        """For as long as the attempt lasts. Never raises: a log is worth no attempt."""
        while True:
            await self._new.wait()
            self._new.clear()
            while self._sent or self._waiting:
                if not await self._ship_one():
                    await asyncio.sleep(2)
            await asyncio.sleep(PAUSE_SECONDS)

    def rest(self) -> LogRest | None:
        """For the receipt. Whatever was under way may be sent again: it is stored once."""
        body = self._sent + bytes(self._waiting)
        text = base64.b64encode(body).decode()
        return LogRest(offset=self._offset, body=text) if body else None

    async def _ship_one(self) -> bool:
        if not self._sent:
            self._sent = bytes(self._waiting[:BATCH_BYTES])
            del self._waiting[:BATCH_BYTES]
        try:
            taken = await send(self._wire, self._path, self._token, self._offset, self._sent)
        except Unreachable:
            return False
        except TuningAPIError as error:
            log.warning("%s: refused: %s", self._path, error)
            return False
        self._sent = self._sent[max(0, taken - self._offset) :]
        self._offset = taken
        return True

    def _drop_middle(self) -> None:
        head, tail = MAX_HELD_BYTES // 4, MAX_HELD_BYTES // 2
        first, last = bytes(self._waiting[:head]), bytes(self._waiting[-tail:])
        self._dropped += len(self._waiting) - head - tail
        marker = f"\n[the API was away: about {self._dropped} bytes of log left out]\n"
        self._waiting = bytearray(first + marker.encode() + last)


async def send(wire: Wire, path: str, token: str, offset: int, body: bytes) -> int:
    """How far the API has the log now. Raises Unreachable, TuningAPIError."""
    headers = {"Content-Type": "application/octet-stream"}
    target = f"{path}?offset={offset}"
    return (await wire.send("POST", target, body, LogTaken, token, 30, headers)).offset

"""Readers of event streams, cheap enough that a thousand of them leave the server's core alone.

    echo '{"url": …, "job_id": …, "count": 1000, "returning": 300}' | python bench/readers.py

Says `open` once every stream has begun, and ends once each has seen the job's end: then one JSON
with `waits` (seconds from an event's time in the row to its arrival), `events`, `lost`, `doubled`,
`disordered`, `returned`. With `"is_frozen"` it opens `count` streams, says `open`, and reads
nothing at all until it is killed.
"""

import asyncio
import json
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

FINAL = {"succeeded", "failed", "cancelled"}


@dataclass
class Tally:
    order: dict[str, Any]
    waits: list[float] = field(default_factory=list)
    events: int = 0
    doubled: int = 0
    disordered: int = 0
    lost: int = 0
    returned: int = 0
    open: int = 0
    over: int = 0
    all_open: asyncio.Event = field(default_factory=asyncio.Event)
    all_over: asyncio.Event = field(default_factory=asyncio.Event)

    def request(self, mark: str) -> bytes:
        path = f"/jobs/{self.order['job_id']}/events"
        head = f"GET {path} HTTP/1.1\r\nHost: {urlsplit(self.order['url']).netloc}\r\n"
        return f"{head}{f'Last-Event-ID: {mark}' if mark else 'Accept: */*'}\r\n\r\n".encode()


class Reader(asyncio.Protocol):
    """One stream; a returning one cuts its connection after its `leave_at`th event."""

    def __init__(self, tally: Tally, leave_at: int | None) -> None:
        self.tally, self.leave_at = tally, leave_at
        self.mark = tally.order.get("mark", "")
        self.seq = int(self.mark or 0)
        self.is_over = False
        self.is_counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.rest = b""
        self.text = b""
        self.is_in_head = True
        transport.write(self.tally.request(self.mark))

    def data_received(self, data: bytes) -> None:
        arrived = time.time()
        self.rest += data
        if self.is_in_head and not self._take_head():
            return
        self._take_chunks()
        *frames, self.text = self.text.split(b"\n\n")
        for one in frames:
            is_event = b"\ndata: " in one and b"\nevent: " not in one
            if is_event and not self._take(one, arrived):
                return

    def connection_lost(self, failure: Exception | None) -> None:
        if not self.is_over:
            self.tally.returned += 1
            asyncio.get_running_loop().create_task(connect(self))

    def _take_head(self) -> bool:
        head, found, rest = self.rest.partition(b"\r\n\r\n")
        if not found:
            return False
        assert head.startswith(b"HTTP/1.1 200"), head
        self.rest, self.is_in_head = rest, False
        if not self.is_counted:
            self.is_counted = True
            self.tally.open += 1
            if self.tally.open == self.tally.order["count"]:
                self.tally.all_open.set()
        return True

    def _take_chunks(self) -> None:
        while True:
            size, found, rest = self.rest.partition(b"\r\n")
            if not found or len(rest) < int(size, 16) + 2:
                return
            length = int(size, 16)
            self.text += rest[:length]
            self.rest = rest[length + 2 :]

    def _take(self, one: bytes, arrived: float) -> bool:
        """Whether to read on."""
        tally = self.tally
        mark, _, data = one.partition(b"\ndata: ")
        event = json.loads(data)
        tally.events += 1
        tally.doubled += event["seq"] == self.seq
        tally.disordered += event["seq"] < self.seq
        tally.lost += max(0, event["seq"] - self.seq - 1)
        self.seq, self.mark = event["seq"], mark.removeprefix(b"id: ").decode()
        if event["at"] >= tally.order["since"]:
            tally.waits.append(arrived - event["at"])
        if event["type"] in FINAL:
            self.is_over = True
            tally.over += 1
            if tally.over == tally.order["count"]:
                tally.all_over.set()
            self.transport.close()
            return False
        if self.leave_at is not None and self.seq >= self.leave_at:
            self.leave_at = None
            self.transport.abort()
            return False
        return True


async def connect(reader: Reader) -> None:
    address = urlsplit(reader.tally.order["url"])
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: reader, address.hostname, address.port)


async def read(order: dict[str, Any]) -> dict[str, Any]:
    tally = Tally({"since": time.time(), **order})
    dice = random.Random(order.get("seed", 0))
    leaving = set(dice.sample(range(order["count"]), order.get("returning", 0)))
    places = [dice.randrange(*order.get("leave_at", (5, 28))) for _ in range(order["count"])]
    for start in range(0, order["count"], 50):
        readers = [
            Reader(tally, places[number] if number in leaving else None)
            for number in range(start, min(start + 50, order["count"]))
        ]
        await asyncio.gather(*map(connect, readers))
    await tally.all_open.wait()
    print("open", flush=True)
    await tally.all_over.wait()
    used = time.process_time()
    names = ("waits", "events", "lost", "doubled", "disordered", "returned")
    return {**{name: getattr(tally, name) for name in names}, "cpu": used}


def freeze(order: dict[str, Any]) -> None:
    address = urlsplit(order["url"])
    request = Tally.request(Tally(order), "")
    held = []
    for _ in range(order["count"]):
        one = socket.create_connection((address.hostname, address.port))
        one.sendall(request)
        held.append(one)
    print("open", flush=True)
    sys.stdin.read()
    time.sleep(3600)


if __name__ == "__main__":
    ordered = json.loads(sys.stdin.readline())
    if ordered.get("is_frozen"):
        freeze(ordered)
    else:
        print(json.dumps(asyncio.run(read(ordered))))

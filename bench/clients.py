"""Cheap HTTP clients in processes of their own, so that what is measured is the server alone.

    echo '{"url": …}' | python bench/clients.py

Reads one order as JSON on stdin: `url`, `connections`, `bodies` (JSON texts, sent in turn), `count`
(replies wanted; 0: until the server is gone), `keyed` (every so many requests carry an
Idempotency-Key), `mark` (makes the keys this process's own). Writes one JSON: times of `began` and
`ended` (seconds of the machine's monotonic clock), `waits` (seconds each), `ids`, `statuses`.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CONNECT_TRIES = 50


@dataclass
class Burst:
    """What all connections of a process share."""

    order: dict[str, Any]
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    waits: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def request(self, number: int) -> bytes:
        bodies = self.order["bodies"]
        body = bodies[number % len(bodies)].encode()
        key = ""
        if self.order["keyed"] and number % self.order["keyed"] == 0:
            key = f"Idempotency-Key: {self.order['mark']}-{number}\r\n"
        head = (
            f"{self.order['method']} {self.order['path']} HTTP/1.1\r\n"
            f"Host: {self.order['host']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{key}\r\n"
        )
        return head.encode() + body


async def one(burst: Burst) -> None:
    """A connection that sends its next request when the last one was answered."""
    host, _, port = burst.order["host"].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    count = burst.order["count"]
    try:
        while (number := next(burst.numbers)) < count or not count:
            began = time.monotonic()
            writer.write(burst.request(number))
            status, body = await answer(reader)
            burst.waits.append(time.monotonic() - began)
            burst.statuses[status] += 1
            if burst.order["method"] == "POST" and status == 200:
                burst.ids.append(json.loads(body)["job_id"])
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # it was killed, as ordered
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    size = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head[9:12]), await reader.readexactly(int(size))


async def drive(order: dict[str, Any]) -> dict[str, Any]:
    burst = Burst(order | {"host": urlsplit(order["url"]).netloc})
    began = time.monotonic()
    await asyncio.gather(*(one(burst) for _ in range(order["connections"])))
    ended = time.monotonic()
    return {
        "began": began,
        "ended": ended,
        "waits": burst.waits,
        "ids": burst.ids,
        "statuses": burst.statuses,
    }


@dataclass
class Drivers:
    """Processes of clients that run one order each, at the same time."""

    url: str
    processes: int = 2
    _running: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start(self, connections: int, count: int, **order: Any) -> None:
        """`connections` and `count` are of all of them together; `count` 0 runs until the end."""
        for mark in range(self.processes):
            process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert process.stdin
            part = {
                "url": self.url,
                "method": "GET",
                "bodies": [""],
                "keyed": 0,
                "mark": f"{time.monotonic_ns()}-{mark}",
                "connections": connections // self.processes,
                "count": count // self.processes,
            }
            process.stdin.write(json.dumps(part | order).encode())
            process.stdin.close()
            self._running.append(process)

    def join(self) -> list[dict[str, Any]]:
        found = []
        for process in self._running:
            assert process.stdout
            found.append(json.loads(process.stdout.read()))
            process.wait()
        self._running.clear()
        return found


if __name__ == "__main__":
    json.dump(asyncio.run(drive(json.load(sys.stdin))), sys.stdout)

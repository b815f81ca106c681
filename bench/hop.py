"""What the API's hop to the engine costs: a request's time more, and a streamed token's work.

    python bench/hop.py [--streams N] [--tokens N] [--pause SECONDS] [--json PATH]

The engine is a process that answers at once and computes nothing, so that only the way to it is
measured: straight, through a bare asyncio relay (bytes in, bytes out, on the API's own event loop
implementation), and through the API. All three in one run, in turns; each in a process of its own.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from served import Server, prepare
from table import judge, print_table, write_json

BARS = {
    "a request, p50: API over straight, ms": ("<=", 2.0),
    "a token's CPU: API over relay": ("<=", 1.5),
    "a token's wall: API over relay": ("<=", 1.5),
}
AT_SPEED = 10
"""Times more tokens without pauses, so that what a request costs once does not count."""
KEY = "test-key-001"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--requests", type=int, default=300)
    arguments.add_argument("--streams", type=int, default=16)
    arguments.add_argument("--tokens", type=int, default=500)
    arguments.add_argument("--pause", type=float, default=0.004, help="seconds between two tokens")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--json", type=Path, default=Path("bench/out/hop.json"))
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        figures = asyncio.run(measure(Path(folder), chosen))
    print_table(["figure", "value"], list(figures.items()))
    write_json(chosen.json, {"figures": figures, "verdicts": judge(figures, BARS)})
    return 0


async def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, float]:
    workspace = folder / "workspace"
    workspace.mkdir()
    prepare(workspace)
    with beside("engine", "0") as engine, beside("relay", str(engine.port)) as relay:
        url = f"http://127.0.0.1:{engine.port}"
        server = Server(workspace, {"TUNESMITH_ENGINE_URL": url})
        server.start()
        assert server.process is not None
        api = Door("API", int(server.url.rpartition(":")[2]), server.process.pid)
        doors = [engine, relay, api]
        try:
            requests = await all_requests(doors, chosen)
            streams = await all_streams(doors, chosen)
        finally:
            server.stop()
    return requests | streams


class Door:
    """A way to the engine: straight, through the relay, or through the API."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name, self.port, self._process = name, port, psutil.Process(pid)

    def cpu(self) -> float:
        used = self._process.cpu_times()
        return float(used.user + used.system)


async def all_requests(doors: list[Door], chosen: argparse.Namespace) -> dict[str, float]:
    """One after the other on one connection, the doors in turns."""
    taken: dict[str, list[float]] = {door.name: [] for door in doors}
    for _ in range(chosen.rounds):
        for door in doors:
            taken[door.name] += await requests(door, chosen.requests)
    p50 = {name: statistics.median(times) * 1000 for name, times in taken.items()}
    found = {f"a request, p50: {name}, ms": round(value, 3) for name, value in p50.items()}
    return found | {
        "a request, p50: API over straight, ms": round(p50["API"] - p50["straight"], 3),
    }


async def all_streams(doors: list[Door], chosen: argparse.Namespace) -> dict[str, float]:
    """Many at once: at the pace of a model, for the CPU; as fast as they go, for the wall."""
    count = chosen.streams * chosen.tokens
    cpu: dict[str, list[float]] = {door.name: [] for door in doors}
    wall: dict[str, list[float]] = {door.name: [] for door in doors}
    for _ in range(chosen.rounds):
        for door in doors:
            before = door.cpu()
            await streams(door, chosen, chosen.tokens, chosen.pause)
            cpu[door.name].append((door.cpu() - before) / count * 1e6)
            began = time.perf_counter()
            await streams(door, chosen, chosen.tokens * AT_SPEED, 0)
            wall[door.name].append((time.perf_counter() - began) / count / AT_SPEED * 1e6)
    found = {}
    for kind, told in (("CPU", cpu), ("wall", wall)):
        middle = {name: statistics.median(values) for name, values in told.items()}
        found |= {f"a token's {kind}: {name}, us": round(middle[name], 1) for name in middle}
        found[f"a token's {kind}: API over relay"] = round(middle["API"] / middle["relay"], 2)
    return found


async def requests(door: Door, count: int) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        writer.write(request({"stream": False}))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head, head
        await body_of(reader, head)
        taken.append(time.perf_counter() - began)
    writer.close()
    return taken


async def streams(door: Door, chosen: argparse.Namespace, tokens: int, pause: float) -> None:
    asked = {"stream": True, "count": tokens, "pause": pause}
    await asyncio.gather(*(stream(door, asked) for _ in range(chosen.streams)))


async def stream(door: Door, asked: dict[str, object]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(request(asked))
    kept = b""
    while b"[DONE]" not in kept:
        part = await reader.read(1 << 16)
        assert part, kept
        kept = kept[-16:] + part
    writer.close()


async def body_of(reader: asyncio.StreamReader, head: bytes) -> None:
    lower = head.lower()
    if b"content-length" in lower:
        length = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
    await reader.readexactly(2)


def request(asked: dict[str, object]) -> bytes:
    messages = [{"role": "user", "content": "Say 7."}]
    body = json.dumps({"model": "engine", "messages": messages, **asked}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}"
    head += f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextlib.contextmanager
def beside(what: str, argument: str) -> Iterator[Door]:
    """`hop_beside.py engine` or `relay`, in a process of its own."""
    program = str(Path(__file__).with_name("hop_beside.py"))
    process = subprocess.Popen([sys.executable, program, what, argument], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Door("straight" if what == "engine" else what, port, process.pid)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    raise SystemExit(main())

"""Servers that are stopped and started again under load: nobody's request fails, no job is lost."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx2
import pytest

from hand import Hand, Unavailable
from house import QUICK, House, build
from servers import free_port
from tuning_sdk import JobEvent, TuningClient

PATIENCE = 120.0
COMMAND = (sys.executable, "-m", "tunesmith.cli")


@dataclass
class Server:
    """`tunesmith api --no-worker` on a port that it keeps."""

    house: House
    ends: contextlib.ExitStack
    """Where what runs still is killed at the test's end."""
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> "Server":
        environment = {name: told for name, told in os.environ.items() if "TUNESMITH" not in name}
        place = {"TUNESMITH_WORKSPACE": str(self.house.workspace)}
        with (self.house.workspace / f"server-{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "api", "--no-worker", "--port", str(self.port)],
                env=environment | QUICK | self.house.over | place,
                stdout=log,
                stderr=log,
            )
        self.ends.callback(end, self.process)
        self.house.wait(lambda: httpx2.get(f"{self.url}/health/ready").status_code == 200)
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> int:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


class Proxy:
    """Sends each connection on to the first server, from the last one's place on, that takes it."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._turns = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._carrying: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._over.wait()
        server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)
        await asyncio.sleep(0.1)  # until what they closed is closed

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        try:
            await self._carry_on(reader, writer)
        finally:
            writer.close()

    async def _carry_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = next(self._turns)
        for step in range(len(self._ports)):
            port = self._ports[(turn + step) % len(self._ports)]
            with contextlib.suppress(OSError):
                upstream = await asyncio.open_connection("127.0.0.1", port)
                try:
                    await asyncio.gather(pipe(reader, upstream[1]), pipe(upstream[0], writer))
                finally:
                    upstream[1].close()
                return


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
    writer.close()


@dataclass
class Load:
    """A client's thread that submits, looks, lists and cancels, one after the other."""

    url: str
    over: threading.Event
    submitted: list[str] = field(default_factory=list)
    calls: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        with TuningClient(api_key="test-key-001", base_url=self.url) as client:
            while not self.over.is_set():
                try:
                    self._turn(client)
                except Exception as error:
                    self.failures.append(repr(error))
                time.sleep(0.1)

    def _turn(self, client: TuningClient) -> None:
        job = client.jobs.train_sft("models/tiny", "data/chat.jsonl", suffix="한국어")
        self.submitted.append(job.job_id)
        assert client.jobs.get(job.job_id).job_id == job.job_id
        client.jobs.list(limit=5)
        client.jobs.cancel(job.job_id)
        self.calls += 4


@pytest.fixture
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """On the database that the parameter names; SQLite without one."""
    over = {}
    if getattr(request, "param", "sqlite") == "postgresql":
        over["TUNESMITH_DATABASE_URL"] = request.getfixturevalue("postgres").database()
    house = build(tmp_path, **over)
    try:
        yield house
    finally:
        house.end()


@pytest.fixture
def ends() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as ends:
        yield ends


@pytest.mark.parametrize("house", ["sqlite", "postgresql"], indirect=True)
def test_servers_restarted_in_turn_fail_no_request_and_lose_no_job(
    house: House, ends: contextlib.ExitStack
) -> None:
    count = 2 if "TUNESMITH_DATABASE_URL" in house.over else 1
    servers = [Server(house, ends).start() for _ in range(count)]
    proxy = ends.enter_context(Proxy([server.port for server in servers]))
    house.url = proxy.url
    job_id = house.submit()
    hand = Hand(house.workspace, proxy.url)
    ends.callback(hand.close)
    assert hand.claim() == job_id
    over = threading.Event()
    followed: list[JobEvent] = []
    loads = [Load(proxy.url, over) for _ in range(2)]
    works: list[Callable[[], None]] = [load.run for load in loads]
    works.append(partial(talk, hand, over))
    talking = [threading.Thread(target=work, daemon=True) for work in works]
    reading = threading.Thread(target=follow, args=(proxy.url, job_id, followed), daemon=True)
    for thread in (*talking, reading):
        thread.start()
    house.wait(lambda: followed and all(load.calls for load in loads))
    for server in servers:
        assert server.stop() == 0
        server.start()
    told, calls = hand.said, [load.calls for load in loads]
    house.wait(lambda: all(load.calls > was for load, was in zip(loads, calls, strict=True)))
    house.wait(lambda: hand.said > told)
    over.set()
    for thread in talking:
        thread.join()
    assert house.job(job_id)["attempts"] == 1
    hand.end()
    reading.join()
    assert [failure for load in loads for failure in load.failures] == []
    assert [event.seq for event in followed] == list(range(1, len(followed) + 1))
    words = [event.data["message"] for event in followed if event.type == "notice"]
    assert words == [f"단어 {number}" for number in range(1, len(words) + 1)]
    assert len(words) == hand.said - 1  # and `started`
    submitted = [made for load in loads for made in load.submitted]
    kept = {row[0]: row[1] for row in house.query("select id, state from jobs")}
    assert len(submitted) == len(set(submitted))
    assert kept == {job_id: "failed"} | dict.fromkeys(submitted, "cancelled")
    assert [server.stop() for server in servers] == [0] * count


def talk(hand: Hand, over: threading.Event) -> None:
    """As a worker does: what was not taken is said again, under the same number."""
    while not over.is_set():
        with contextlib.suppress(httpx2.TransportError, Unavailable):
            hand.note(f"단어 {hand.said}")
        time.sleep(0.1)


def follow(url: str, job_id: str, found: list[JobEvent]) -> None:
    with TuningClient(api_key="test-key-001", base_url=url) as client:
        found.extend(client.jobs.events(job_id))


def test_a_server_that_is_told_to_end_finishes_what_it_began(
    house: House, ends: contextlib.ExitStack
) -> None:
    house.over["TUNESMITH_DRAIN_SECONDS"] = "2"
    server = Server(house, ends).start()
    house.url = server.url
    house.submit()
    hand = Hand(house.workspace, server.url)
    job_id = hand.claim()
    polled: list[dict[str, object]] = []
    asking = threading.Thread(target=poll, args=(hand, polled), daemon=True)
    asking.start()
    stream = begin(server, f"GET /jobs/{job_id}/events HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"retry: 1000" in until(stream, b"retry")
    body = json.dumps({"model_name": "models/tiny", "dataset_path": "data/chat.jsonl"})
    head = (
        "POST /train/sft HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    slow, slower = begin(server, head + body[:9]), begin(server, head + body[:9])
    assert server.process
    server.process.send_signal(signal.SIGTERM)
    told = until(stream, b"server_closing")
    assert b"retry: " in told
    slow.sendall(body[9:].encode())
    assert until(slow, b"job_id").startswith(b"HTTP/1.1 200")
    refused = until(slower, b"shutting down")
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"retry-after: " in refused.lower()
    asking.join()
    assert polled == [{}]
    assert server.process.wait(PATIENCE) == 0
    with pytest.raises(ConnectionRefusedError):
        begin(server, "")
    for one in (stream, slow, slower):
        one.close()
    hand.close()


def test_under_another_server_streams_end_with_it_too(
    house: House, ends: contextlib.ExitStack
) -> None:
    place = {"TUNESMITH_WORKSPACE": str(house.workspace)}
    port = free_port()
    with (house.workspace / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "tunesmith.api.app:app", "--port", str(port)],
            env=os.environ | QUICK | house.over | place,
            stdout=log,
            stderr=log,
        )
    ends.callback(end, process)
    server = Server(house, ends, port, process)
    house.url = server.url
    house.wait(lambda: httpx2.get(f"{server.url}/health/ready").status_code == 200)
    job_id = house.submit()
    stream = begin(server, f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"retry: 1000" in until(stream, b"retry")
    process.send_signal(signal.SIGTERM)
    assert b"retry: " in until(stream, b"server_closing")
    process.wait(PATIENCE)
    stream.close()


def poll(hand: Hand, found: list[dict[str, object]]) -> None:
    ask = {"worker_id": "idle", "claim_id": "1", "wait_seconds": 60}
    nothing = {"slots": 0, "memory_bytes": 0, "max_slots": 1, "max_memory_bytes": 1}
    reply = hand._post("/work", ask | {"capacity": nothing})
    found.append({name: told for name, told in reply.items() if told})


def begin(server: Server, text: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    connection.sendall(text.encode())
    return connection


def until(connection: socket.socket, wanted: bytes) -> bytes:
    """What came until `wanted` was among it."""
    found = b""
    while wanted not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found

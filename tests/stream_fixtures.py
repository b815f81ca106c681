"""A server in this process, on SQLite or PostgreSQL, and readers of its event streams."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from api_fixtures import ASKED
from hand import Hand
from tunesmith.api.app import create_app
from tunesmith.api.feed import Feeds
from tunesmith.api.protocol import Protocol
from tunesmith.hub import Hub
from tunesmith.settings import Settings
from tunesmith.store import jobs

PATIENCE = 60.0
FINAL = {"succeeded", "failed", "cancelled"}


@dataclass
class Frame:
    id: str = ""
    event: str = ""
    retry: str = ""
    comment: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> "Frame":
        frame = cls()
        for line in text.split("\n"):
            name, _, value = line.partition(": ")
            if not line:
                continue
            if name == "data":
                frame.data = json.loads(value)
            else:
                setattr(frame, name or "comment", value)
        return frame


@dataclass
class Site:
    """A server with a database; jobs on it are trained by hands that only talk."""

    workspace: Path
    hub: Hub
    app: FastAPI
    url: str
    port: int
    loop: asyncio.AbstractEventLoop
    hands: list[Hand] = field(default_factory=list)

    @property
    def feeds(self) -> Feeds:
        feeds: Feeds = self.app.state.feeds
        return feeds

    def job(self, **headers: str) -> Hand:
        """A job that has just started, and its hand."""
        reply = httpx2.post(f"{self.url}/train/sft", json=ASKED, headers=headers, timeout=60)
        assert reply.status_code == 200, reply.text
        hand = Hand(self.workspace, self.url, worker_id=f"hand-{len(self.hands)}")
        self.hands.append(hand)
        assert hand.claim() == reply.json()["job_id"]
        return hand

    def last_seq(self, job_id: str) -> int:
        return self.hub.store.read(lambda tx: jobs.get(tx, job_id)).last_seq

    def readers(self) -> int:
        """Streams that are open, by the server's own count."""
        return sum(self.feeds._readers.values())

    def close_streams(self) -> None:
        """What SIGTERM does first."""
        self.loop.call_soon_threadsafe(self.app.state.watcher.close)


@contextlib.contextmanager
def serving(workspace: Path, database: str = "", **over: Any) -> Iterator[Site]:
    settings = Settings.read(
        {},
        workspace=workspace,
        database_url=database,
        should_ask_hub=False,
        memory_reserve_bytes=0,
        **over,
    )
    with Hub.open(settings) as hub, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        app = create_app(hub)
        server = uvicorn.Server(
            uvicorn.Config(app, http=Protocol, log_config=None, timeout_graceful_shutdown=5)
        )
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        until(lambda: server.started)
        port = int(listener.getsockname()[1])
        site = Site(workspace, hub, app, f"http://127.0.0.1:{port}", port, loops[0])
        try:
            yield site
        finally:
            for hand in site.hands:
                hand.close()
            site.close_streams()
            server.should_exit = True
            thread.join()


def until(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


async def frames(
    site: Site, job_id: str, mark: str = "", **headers: str
) -> AsyncGenerator[Frame, None]:
    """What a reader gets, by HTTP/1.0: no chunks, and the connection's end is the stream's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        asked = {"Host": f"127.0.0.1:{site.port}", **headers} | (
            {"Last-Event-ID": mark} if mark else {}
        )
        lines = [f"GET /jobs/{job_id}/events HTTP/1.0"] + [f"{k}: {v}" for k, v in asked.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200"), head + (await reader.read()).decode()
        assert "chunked" not in head.lower()
        while True:
            try:
                yield Frame.of((await reader.readuntil(b"\n\n")).decode())
            except (asyncio.IncompleteReadError, ConnectionError):
                return
    finally:
        writer.close()


async def whole(site: Site, job_id: str, mark: str = "", **headers: str) -> list[Frame]:
    return [frame async for frame in frames(site, job_id, mark, **headers)]


def seqs(found: list[Frame]) -> list[int]:
    return [frame.data["seq"] for frame in found if "seq" in frame.data]

"""A stream's way from an engine to a client: bytes as they come, and what ends them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from tunesmith.api.piped import Piped
from tunesmith.api.protocol import Protocol
from tunesmith.hub.answers import LOST, Answer, Target
from tunesmith.hub.hop import Hop, HopError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"data: 7\n\n"
ASKED = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
Source = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Between:
    """The application: each request goes to the source, and its answer to the client."""

    def __init__(self, port: int, send_seconds: float) -> None:
        self.hop = Hop()
        self._url = f"http://127.0.0.1:{port}/v1"
        self._seconds = send_seconds

    def let_go(self, engine_id: str) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            wire = await self.hop.post(self._url, {}, b"{}")
            answer = Answer(Target("engine", self._url, ""), wire, self, self._url)
            await Piped(answer, self._seconds)(scope, receive, send)


@asynccontextmanager
async def piped(source: Source, seconds: float = 30) -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield the port, and the connections that the source got."""
    came: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer)
        try:
            while await reader.readuntil(b"{}"):
                await source(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as engine:
        app = Between(engine.sockets[0].getsockname()[1], seconds)
        config = uvicorn.Config(app, port=0, http=Protocol, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1], came
        server.should_exit = True
        app.hop.close()
        await serving


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one answer, its chunks joined."""
    await reader.readuntil(b"\r\n\r\n")
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


async def three(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    for _ in range(3):
        writer.write(b"9\r\n" + EVENT + b"\r\n")
        await asyncio.sleep(0.005)
    writer.write(b"0\r\n\r\n")


async def broken(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"9\r\n" + EVENT + b"\r\n")
    await writer.drain()
    writer.transport.abort()


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    while True:
        writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
        await writer.drain()


def test_one_connection_carries_one_stream_after_another() -> None:
    async def ask_twice() -> None:
        async with piped(three) as (port, came):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(ASKED)
                assert await answer(reader) == EVENT * 3
            assert len(came) == 1
            writer.close()

    asyncio.run(ask_twice())


def test_an_engine_that_breaks_off_ends_the_stream_with_an_event() -> None:
    async def ask() -> None:
        async with piped(broken) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ASKED)
            assert await answer(reader) == EVENT + LOST
            writer.close()

    asyncio.run(ask())


@pytest.mark.parametrize("is_leaving", [True, False])
def test_a_reader_that_leaves_or_takes_nothing_stops_the_engine(is_leaving: bool) -> None:
    async def ask() -> None:
        async with piped(endless, seconds=0.1) as (port, came):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(ASKED)
            await reader.readuntil(b"\r\n\r\n")
            if is_leaving:
                writer.transport.abort()
            while not came[0].transport.is_closing():
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(ask())


def test_an_answer_that_is_no_http_is_told_as_such() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(babble, "127.0.0.1", 0) as engine:
            url = f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}/"
            with pytest.raises(HopError, match="no HTTP"):
                await Hop().post(url, {}, b"{}")

    asyncio.run(ask())

"""Events to many readers: every event once and in order, whatever a reader does."""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from sqlalchemy import text

from api_fixtures import make_workspace
from servers import Postgres
from stream_fixtures import FINAL, Frame, Site, frames, seqs, serving, until, whole
from tunesmith.api import feed, stream
from tunesmith.api import frames as shapes
from tunesmith.store import keys
from tunesmith.store.tables import ALL

DATABASES = ["sqlite", "postgresql"]
T = TypeVar("T")


def url_of(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "sqlite":
        return ""
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.database()


@pytest.fixture(scope="module", params=DATABASES)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    workspace = make_workspace(tmp_path_factory.mktemp("site"))
    with serving(workspace, url_of(request.param, request)) as site:
        yield site


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path / "workspace")


async def while_talking(talk: Callable[[], None], readers: list[Coroutine[Any, Any, T]]) -> list[T]:
    """What readers found while a job went on."""
    talking = asyncio.create_task(asyncio.to_thread(talk))
    found = await asyncio.gather(*readers)
    await talking
    return found


async def restless(site: Site, job_id: str, dice: random.Random) -> list[int]:
    """A reader that cuts its line again and again, and goes on where it was."""
    found: list[int] = []
    mark = ""
    while True:
        stay = dice.randrange(1, 9)
        async with contextlib.aclosing(frames(site, job_id, mark)) as coming:
            async for frame in coming:
                if not frame.id:
                    continue
                assert frame.event == ""
                found.append(frame.data["seq"])
                mark, stay = frame.id, stay - 1
                if frame.data["type"] in FINAL:
                    return found
                if not stay:
                    break


def test_readers_that_cut_their_line_again_and_again_get_every_event_once(site: Site) -> None:
    hand = site.job()
    job_id = hand.attempt["job_id"]

    def talk() -> None:
        for number in range(30):
            hand.note(f"한국어 中文 🎉 {number}")
        hand.end()

    async def run() -> list[list[int]]:
        readers = [restless(site, job_id, random.Random(seed)) for seed in range(30)]
        return await while_talking(talk, readers)

    for got in asyncio.run(run()):
        assert got == list(range(1, len(got) + 1))
        assert len(got) == site.last_seq(job_id) >= 35
    until(lambda: site.readers() == 0)
    assert site.feeds._feeds == {}


@pytest.mark.parametrize(
    "mark",
    ["-1", "9e99", "abc", "1" * 10_240, "1.5", "0x1", "7", "2-deadbeef", "2-", "99", "\u00b2"],
)
def test_a_mark_that_is_not_this_job_s_is_answered_with_a_reset(site: Site, mark: str) -> None:
    job_id, story = ended(site)
    found = asyncio.run(whole(site, job_id, mark))
    told = next(frame for frame in found if frame.event == "reset")
    assert told.id == f"0-{job_id}"
    assert told.data["state"] == "failed"
    assert (told.data["first_seq"], told.data["last_seq"]) == (1, story[-1])
    assert seqs(found) == story


@pytest.mark.parametrize("mark", ["", "0"])
def test_the_beginning_is_no_reset(site: Site, mark: str) -> None:
    job_id, story = ended(site)
    found = asyncio.run(whole(site, job_id, mark))
    assert seqs(found) == story
    assert not any(frame.event for frame in found)


def test_a_mark_of_this_job_goes_on_after_it_with_or_without_its_name(site: Site) -> None:
    job_id, story = ended(site)
    for mark in ("4", f"4-{job_id}"):
        assert seqs(asyncio.run(whole(site, job_id, mark))) == story[4:]
    assert seqs(asyncio.run(whole(site, job_id, f"{story[-1]}-{job_id}"))) == []


def test_history_that_was_cleared_away_is_told_of(site: Site) -> None:
    job_id, story = ended(site)
    clear = text("delete from events where job_id = :job_id and seq < 4").bindparams(job_id=job_id)
    site.hub.store.write(lambda tx: tx.execute(clear) and None).result()
    found = asyncio.run(whole(site, job_id, "1"))
    [told] = [frame for frame in found if frame.event == "reset"]
    assert (told.id, told.data["first_seq"]) == (f"3-{job_id}", 4)
    assert seqs(found) == story[3:]
    assert not any(frame.event for frame in asyncio.run(whole(site, job_id, "3")))


def ended(site: Site) -> tuple[str, list[int]]:
    """A short job that has ended, and its events' numbers."""
    hand = site.job()
    hand.end()
    job_id = str(hand.attempt["job_id"])
    return job_id, list(range(1, site.last_seq(job_id) + 1))


def test_a_reader_far_behind_pages_through_history_while_the_job_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "RING_EVENTS", 8)
    monkeypatch.setattr(feed, "PAGE_EVENTS", 5)
    monkeypatch.setattr(shapes, "PAGE_EVENTS", 7)
    monkeypatch.setattr(shapes, "CHUNK_BYTES", 2000)
    hand = site.job()
    for _ in range(4):
        hand.say(*[{"type": "notice", "code": "n", "message": "가" * 60}] * 50)
    job_id = hand.attempt["job_id"]

    def talk() -> None:
        for _ in range(10):
            hand.say(*[{"type": "notice", "code": "n", "message": "나"}] * 20)
        hand.end()

    async def run() -> list[list[Frame]]:
        readers = [whole(site, job_id, str(at)) for at in (0, 0, 3, 77, 200)]
        return await while_talking(talk, readers)

    for start, got in zip((0, 0, 3, 77, 200), asyncio.run(run()), strict=True):
        assert seqs(got) == list(range(start + 1, site.last_seq(job_id) + 1))


def test_a_commit_whose_word_is_lost_is_seen_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = site.job()
    with monkeypatch.context() as deaf:
        deaf.setattr(site.hub.store, "_listeners", [])

        async def run() -> list[Frame]:
            reading = asyncio.create_task(whole(site, hand.attempt["job_id"]))
            await asyncio.to_thread(until, lambda: site.readers() == 1)
            await asyncio.to_thread(hand.note, "unheard")
            await asyncio.to_thread(hand.end)
            return await reading

        found = seqs(asyncio.run(run()))
        assert found == list(range(1, site.last_seq(hand.attempt["job_id"]) + 1))


def test_a_stream_outlives_a_table_that_cannot_be_read_for_a_while(site: Site) -> None:
    hand = site.job()

    def change(statement: str) -> None:
        site.hub.store.write(lambda tx: tx.execute(text(statement)) and None).result()

    async def run() -> list[Frame]:
        reading = asyncio.create_task(whole(site, hand.attempt["job_id"]))
        await asyncio.to_thread(until, lambda: site.readers() == 1)
        await asyncio.to_thread(change, "alter table events rename to hidden")
        site.loop.call_soon_threadsafe(
            site.app.state.watcher._wake, frozenset({f"job:{hand.attempt['job_id']}"})
        )
        await asyncio.sleep(0.3)
        await asyncio.to_thread(change, "alter table hidden rename to events")
        await asyncio.to_thread(hand.end)
        return await reading

    found = seqs(asyncio.run(run()))
    assert found == list(range(1, site.last_seq(hand.attempt["job_id"]) + 1))


def test_a_key_that_is_revoked_loses_its_streams(site: Site) -> None:
    mine = site.hub.make_key("사람")
    other = site.hub.make_key("사람")
    headers = {"Authorization": f"Bearer {mine['key']}"}
    hand = site.job(**headers)
    job_id = hand.attempt["job_id"]

    async def run() -> tuple[list[Frame], list[Frame]]:
        cut = asyncio.create_task(whole(site, job_id, **headers))
        goes_on = asyncio.create_task(
            whole(site, job_id, **{"X-API-Key": other["key"]})  # the same owner's
        )
        await asyncio.to_thread(until, lambda: site.readers() == 2)
        revoke = site.hub.store.write(lambda tx: keys.revoke(tx, mine["id"]))
        await asyncio.wrap_future(revoke)  # by another process: nobody tells this one
        gone = await cut
        await asyncio.to_thread(hand.end)
        return gone, await goes_on

    try:
        gone, whole_story = asyncio.run(run())
        assert seqs(whole_story) == list(range(1, site.last_seq(job_id) + 1))
        assert seqs(gone) == seqs(whole_story)[:-1]
        with httpx2.Client(base_url=site.url) as client:
            assert client.get(f"/jobs/{job_id}/events", headers=headers).status_code == 401
    finally:
        wipe = text("delete from api_keys")
        site.hub.store.write(lambda tx: tx.execute(wipe) and None).result()
        site.hub.keys.forget()


def test_streams_of_one_key_are_counted(workspace: Path) -> None:
    with serving(workspace, max_streams=2) as site:
        path = f"/jobs/{site.job().attempt['job_id']}/events"
        with httpx2.Client(base_url=site.url) as client, contextlib.ExitStack() as open_streams:
            for _ in range(2):
                reply = open_streams.enter_context(client.stream("GET", path))
                assert reply.status_code == 200
            refused = client.get(path)
            assert refused.status_code == 429
            assert "2 event streams" in refused.json()["detail"]
            assert int(refused.headers["retry-after"]) > 0
            other = {"X-API-Key": "test-key-001"}
            with client.stream("GET", path, headers=other) as reply:
                assert reply.status_code == 200
            open_streams.close()
            until(lambda: site.readers() == 0)
            with client.stream("GET", path) as reply:
                assert reply.status_code == 200


def test_readers_that_take_nothing_are_cut_off_and_cost_the_others_nothing(
    workspace: Path,
) -> None:
    with serving(workspace, stream_send_seconds=1) as site:
        hand = site.job()
        job_id = hand.attempt["job_id"]
        frozen = [freeze(site, job_id) for _ in range(5)]
        until(lambda: site.readers() == 5)

        def talk() -> None:
            for _ in range(12):
                hand.say(*[{"type": "notice", "code": "n", "message": "가" * 3000}] * 60)
            until(lambda: site.readers() <= 3)  # not before the frozen ones were cut
            hand.end()

        async def run() -> list[list[Frame]]:
            return await while_talking(talk, [whole(site, job_id) for _ in range(3)])

        for got in asyncio.run(run()):
            assert seqs(got) == list(range(1, site.last_seq(job_id) + 1))
        for connection in frozen:
            connection.close()


def freeze(site: Site, job_id: str) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", site.port))
    request = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    connection.sendall(request.encode())
    return connection


def test_a_silent_job_s_stream_says_that_it_lives(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEEP_ALIVE_SECONDS", 0.1)
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.05)

    async def run(site: Site, job_id: str) -> str:
        async with contextlib.aclosing(frames(site, job_id)) as coming:
            return await anext(frame.comment async for frame in coming if frame.comment)

    with serving(workspace) as site:
        assert asyncio.run(run(site, site.job().attempt["job_id"])) == "keep-alive"


def test_a_server_that_ends_says_so_and_when_to_come_back(workspace: Path) -> None:
    async def run(site: Site, job_id: str) -> list[Frame]:
        reading = asyncio.create_task(whole(site, job_id))
        await asyncio.to_thread(until, lambda: site.readers() == 1)
        site.close_streams()
        return await reading

    with serving(workspace) as site:
        last = asyncio.run(run(site, site.job().attempt["job_id"]))[-1]
    assert (last.event, last.id) == ("server_closing", "")
    assert 1000 <= int(last.retry) <= 3000


def test_what_is_still_in_flight_at_the_end_is_ended_cleanly(workspace: Path) -> None:
    async def endless() -> AsyncGenerator[str, None]:
        while True:
            yield "data: 한국어\n\n"
            await asyncio.sleep(0.01)

    async def stuck() -> None:
        await asyncio.sleep(3600)

    async def ask(site: Site, path: str, begun: asyncio.Event) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
        try:
            first = await reader.read(65536)
            while path == "/endless" and "한국어".encode() not in first:
                first += await reader.read(65536)
            begun.set()
            return first + await reader.read()
        finally:
            writer.close()

    async def run(site: Site) -> list[bytes]:
        begun, refused = asyncio.Event(), asyncio.Event()
        asking = [
            asyncio.create_task(ask(site, "/endless", begun)),
            asyncio.create_task(ask(site, "/stuck", refused)),
        ]
        in_flight = site.app.state.in_flight
        await asyncio.to_thread(until, lambda: len(in_flight.tasks) == 2)
        await begun.wait()
        site.loop.call_soon_threadsafe(in_flight.cut)
        return await asyncio.gather(*asking)

    with serving(workspace) as site:
        site.app.add_api_route("/endless", lambda: stream.EventStream(endless()))
        site.app.add_api_route("/stuck", stuck)
        told, refused = asyncio.run(run(site))
    last = told.decode().split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_closing"
    assert "한국어" in told.decode()
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"retry-after: " in refused.lower()
    assert b"shutting down" in refused


def test_other_methods_are_answered_without_a_stream(site: Site) -> None:
    path = f"/jobs/{site.job().attempt['job_id']}/events"
    with httpx2.Client(base_url=site.url) as client:
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
        assert head.headers["cache-control"] == "no-store"
        assert client.head("/jobs/00000000/events").status_code == 404
        options = client.options(path)
        assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
        assert client.post(path).status_code == 405
        with client.stream("GET", path) as reply:
            assert reply.headers["cache-control"] == "no-store"
            assert next(reply.iter_lines()) == "retry: 1000"


def test_headers_without_an_end_are_refused(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port)) as endless:
        endless.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                endless.sendall(b"a" * 16_384)
        with contextlib.suppress(ConnectionError):
            assert endless.recv(64).startswith(b"HTTP/1.1 400")


def test_a_frame_is_one_line_whatever_its_text() -> None:
    data = {"message": "한\r\ndata: x\n\n\u2028 🎉"}
    row = {"seq": 7, "fence": 1, "at": 1.5, "type": "notice", "data": data}
    told = shapes.frame("a1b2c3d4", row)  # type: ignore[arg-type]
    assert told.count(b"\n") == 3
    mark, line = told.decode().split("\n")[:2]
    assert mark == "id: 7-a1b2c3d4"
    assert json.loads(line.removeprefix("data: ")) == row


def test_who_waits_for_any_topic_is_woken_by_the_topic_of_everything() -> None:
    async def run() -> None:
        watcher = stream.Watcher()
        with watcher.watch("job:1") as one, watcher.watch("queue") as two:
            watcher.notify(frozenset({ALL}))
            assert await stream.wait(one, 60)
            assert await stream.wait(two, 60)

    asyncio.run(run())

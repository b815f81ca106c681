"""The worker's small parts: log, session, receipt, wire, spool, and the tail of a log."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.errors import FencedError, NotFoundError
from tunesmith.hub.logs import Logs
from tunesmith.spec.hands import NumberedEvent, Orders, Report
from tunesmith.spec.records import Outcome
from tunesmith.work import spool as spool_module
from tunesmith.work.pump import CappedLog, pump
from tunesmith.work.receipt import NAME, Receipt, left_over
from tunesmith.work.session import kill_session, members
from tunesmith.work.spool import Spool
from tunesmith.work.wire import Nothing, Unreachable, Wire, pid_space
from work_fixtures import Api, an_api, is_alive

BEAT = Report(worker_id="w")
RECEIPT = Receipt(
    path="/attempts/0badcafe/3",
    token="at-secret",
    worker_id="w",
    events=tuple(NumberedEvent(n=n, event={"type": "notice"}) for n in range(1, 451)),
    outcome=Outcome(kind="failed", message="한국어 中文 🌊"),
)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with an_api(tmp_path) as opened:
        yield opened


# the log


def test_a_log_keeps_its_beginning_and_its_end_under_its_cap(tmp_path: Path) -> None:
    place = tmp_path / "job.log"
    log = CappedLog(place, 10_000)
    for n in range(5_000):
        log.write(f"줄 {n} 行\n".encode())
        assert place.stat().st_size <= 10_000 + 200
    log.close()
    lines = place.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "줄 0 行"
    assert lines[-1] == "줄 4999 行"
    assert [line.startswith("[log truncated here") for line in lines].count(True) == 1
    assert list(tmp_path.iterdir()) == [place]


def test_a_block_over_the_whole_cap_does_not_break_it(tmp_path: Path) -> None:
    place = tmp_path / "job.log"
    log = CappedLog(place, 4_096)
    log.write(b"first\n" + b"\x00\xff" * 50_000 + b"\nlast\n")
    log.close()
    body = place.read_bytes()
    assert len(body) <= 4_096 + 100
    assert body.startswith(b"first\n")
    assert body.endswith(b"\nlast\n")


def test_a_log_that_was_full_goes_on_in_the_next_attempt(tmp_path: Path) -> None:
    place = tmp_path / "job.log"
    for attempt in range(3):
        log = CappedLog(place, 4_096)
        for n in range(300):
            log.line(f"{attempt}: {n} of a line that is a little longer")
        log.close()
        assert place.stat().st_size <= 4_096 + 200
    assert place.read_text().endswith("2: 299 of a line that is a little longer\n")


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk."""
    before = (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    log = CappedLog(tmp_path / "job.log", 4_000)
    log.line("good")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1][1]))
    try:
        asyncio.run(_pumped(log, b"x" * 100_000 + b"\n"))
        log.line("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    log.line("good again")
    log.close()
    body = (tmp_path / "job.log").read_bytes()
    assert body.startswith(b"good\n")
    assert body.endswith(b"good again\n")
    assert [path.name for path in tmp_path.iterdir()] == ["job.log"]


async def _pumped(log: CappedLog, body: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(body)
    reader.feed_eof()
    await pump(reader, log)


def test_the_tail_of_a_log_counts_lines_by_their_ends_alone(tmp_path: Path) -> None:
    place = tmp_path / "job.log"
    place.write_bytes(b"one\n 10%\r 50%\r100%\r\n\x1b[31mred\x0bthere\n\xff\xfe\nhalf")
    logs = Logs()
    assert logs.tail(place, 0) == (["one", "100%", "\\x1b[31mred\\x0bthere", "��"], 4)
    assert logs.tail(place, 3) == (["100%", "\\x1b[31mred\\x0bthere", "��"], 4)
    with place.open("ab") as file:
        file.write("가".encode() * 50_000 + b"\n")
    (line,), total = logs.tail(place, 1)
    assert total == 5
    assert line.endswith("가")
    assert len(line) < 22_000
    place.write_bytes(b"anew\n")
    assert logs.tail(place, 9) == (["anew"], 1)


# the session


def test_a_session_is_killed_with_grandchildren_whose_parents_are_gone(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "import os, sys, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0:\n"
        f"            open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "            os.setpgid(0, 0)\n"
        "            time.sleep(600)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-S", "-c", script]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        while not pids.exists() or len(pids.read_text().split()) < 3:
            time.sleep(0.01)
        found = [int(word) for word in pids.read_text().split()]
        assert {leader.pid, *found} == set(members(leader.pid))
        kill_session(leader.pid)
        assert leader.wait(30) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(map(is_alive, found)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, found))


def test_a_process_with_an_unreadable_name_hides_nobody() -> None:
    """Names are cut at 15 bytes, in the middle of a letter too."""
    name = "훈련하는 과정".encode()[:15]
    script = (
        f"import ctypes, time; ctypes.CDLL(None).prctl(15, {name!r})\n"
        "print(1, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-S", "-c", script]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as odd:
        assert odd.stdout is not None
        odd.stdout.readline()
        with pytest.raises(UnicodeDecodeError):
            Path(f"/proc/{odd.pid}/stat").read_text(encoding="utf-8")
        assert list(members(odd.pid)) == [odd.pid]
        kill_session(odd.pid)
        assert odd.wait(30) == -signal.SIGKILL


# the wire


def ask(folder: Path, token: str = "at-1") -> Orders:
    async def once() -> Orders:
        wire = Wire(folder)
        try:
            return await wire.ask("/attempts/0badcafe/1/report", BEAT, Orders, token)
        finally:
            await wire.close()

    return asyncio.run(once())


@pytest.mark.parametrize(
    "answer",
    [
        (200, "<html>welcome</html>"),
        (200, "[]"),
        (200, '{"lease_seconds": "soon"}'),
        (200, '{"lease_seconds": 60, "a_word_of_a_later_version": 1}'),
        (404, "no such page"),
        (401, '{"detail": "who are you"}'),
        (405, "{}"),
        (500, ""),
        (503, "{}"),
        (302, ""),
    ],
)
def test_what_does_not_speak_as_the_api_does_is_not_the_api(
    tmp_path: Path, api: Api, answer: tuple[int, str]
) -> None:
    api.answer = answer
    with pytest.raises(Unreachable):
        ask(tmp_path)


def test_the_api_s_own_refusals_are_told_apart(tmp_path: Path, api: Api) -> None:
    said = {"error": {"message": "no", "type": "x", "param": None, "code": "fenced"}}
    api.answer = 409, json.dumps(said)
    with pytest.raises(FencedError):
        ask(tmp_path)
    said["error"]["code"] = "not_found"
    api.answer = 404, json.dumps(said)
    with pytest.raises(NotFoundError):
        ask(tmp_path)


@pytest.mark.parametrize(
    "note", ["", "{", "null", "[]", "{}", '{"url": 5}', '{"url": "x y"}', '{"url": ', "[" * 9000]
)
def test_a_broken_address_file_is_an_api_that_is_away(tmp_path: Path, api: Api, note: str) -> None:
    (tmp_path / "api.json").write_text(note)
    with pytest.raises(Unreachable):
        ask(tmp_path)


def test_the_address_of_a_server_that_has_ended_gets_no_token(tmp_path: Path, api: Api) -> None:
    url = json.loads((tmp_path / "api.json").read_text())["url"]
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as gone:
        gone.wait()
    api.write_address(url, pid=gone.pid, pid_space=pid_space())
    with pytest.raises(Unreachable, match="has ended"):
        ask(tmp_path)
    assert api.reports == 0
    api.write_address(url, pid=gone.pid, pid_space="another container's")
    ask(tmp_path)
    api.write_address(url, pid=os.getpid(), pid_space=pid_space())
    ask(tmp_path)
    assert api.reports == 2


def test_a_token_that_cannot_be_sent_is_said_to_be_missing(tmp_path: Path, api: Api) -> None:
    for body in (b"", b"\xff\xfe", "비밀".encode(), b"two\nlines"):
        (tmp_path / "worker.token").write_bytes(body)
        with pytest.raises(Unreachable, match="token"):
            ask(tmp_path, token="")


# the receipt


def deliver(folder: Path, receipt: Receipt = RECEIPT) -> bool:
    async def once() -> bool:
        wire = Wire(folder)
        try:
            return await asyncio.wait_for(receipt.deliver(wire), 30)
        finally:
            await wire.close()

    return asyncio.run(once())


def test_a_receipt_is_found_again_and_delivered_whole(tmp_path: Path, api: Api) -> None:
    place = tmp_path / "jobs" / "0badcafe" / "attempts" / "3"
    place.mkdir(parents=True)
    RECEIPT.keep(place)
    assert (place / NAME).stat().st_mode & 0o777 == 0o600
    ((folder, found),) = left_over(tmp_path / "jobs")
    assert (folder, found) == (place, RECEIPT)
    assert (found.attempt.job_id, found.attempt.fence) == ("0badcafe", 3)
    assert deliver(tmp_path, found)
    assert [n for n, _ in api.events] == list(range(1, 451))
    assert [outcome["message"] for outcome in api.outcomes] == ["한국어 中文 🌊"]
    Receipt.forget(place)
    Receipt.forget(place)
    assert left_over(tmp_path / "jobs") == []


def test_a_broken_receipt_is_told_of_without_its_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for fence, body in enumerate([b"", b"\xff", b'{"token": "at-secret"}', b"[" * 9000], 1):
        place = tmp_path / "0badcafe" / "attempts" / str(fence)
        place.mkdir(parents=True)
        (place / NAME).write_bytes(body)
    odd = RECEIPT.model_copy(update={"path": "/nonsense", "token": "at-secret"})
    odd.keep(tmp_path / "0badcafe" / "attempts" / "1")
    assert left_over(tmp_path) == []
    assert len(caplog.records) == 4
    assert "at-secret" not in caplog.text


def test_a_receipt_waits_out_a_stranger_on_the_api_s_port(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another workspace's server refuses the token: the outcome is not thrown away for that."""
    refusal = {"error": {"message": "no", "type": "x", "param": None, "code": None}}
    api.answer = 401, json.dumps(refusal)

    async def wait_out() -> bool:
        wire = Wire(tmp_path)
        delivery = asyncio.create_task(RECEIPT.deliver(wire))
        await asyncio.sleep(0.5)
        assert not delivery.done()
        api.answer = None
        done = await asyncio.wait_for(delivery, 30)
        await wire.close()
        return done

    assert asyncio.run(wait_out())
    assert len(api.outcomes) == 1
    api.answer = 401, json.dumps(refusal)
    monkeypatch.setattr("tunesmith.work.wire.STRANGER_SECONDS", 0)
    assert not deliver(tmp_path)


@pytest.mark.parametrize("why", ["it is back", "it is wanted now"])
def test_a_receipt_does_not_sleep_while_the_api_is_there(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """What pauses for long after a failure is woken by another's success, or by a wish."""
    monkeypatch.setattr("tunesmith.work.wire.FIRST_PAUSE_SECONDS", 600.0)
    api.answer = 503, ""

    async def deliver_late() -> bool:
        wire = Wire(tmp_path)
        delivery = asyncio.create_task(RECEIPT.deliver(wire))
        while not wire._is_away:
            await asyncio.sleep(0.01)
        api.answer = None
        if why == "it is back":
            await wire.ask("/engines/x", RECEIPT.outcome, Nothing)
        else:
            await asyncio.sleep(0.1)
            wire.stir()
        done = await asyncio.wait_for(delivery, 30)
        await wire.close()
        return done

    assert asyncio.run(deliver_late())
    assert len(api.outcomes) == 1


# the spool


def test_events_are_numbered_once_and_a_batch_is_the_same_until_it_is_taken() -> None:
    spool = Spool(first_n=7)
    for n in range(3):
        spool.add({"type": "notice", "n": n})
    first = spool.batch()
    spool.add({"type": "notice", "n": 3})
    assert spool.batch() == first
    assert [event.n for event in first] == [7, 8, 9]
    assert not spool.accept(8)
    assert [event.n for event in spool.batch()] == [9]
    assert spool.accept(9)
    assert [event.n for event in spool.batch()] == [10]
    spool.add({"type": "notice", "n": 4})
    assert [event.n for event in spool.rest()] == [10, 11]
    assert len(spool) == 2


def test_a_long_absence_thins_the_curve_and_leaves_no_gap_in_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spool_module, "MAX_HELD", 1_000)
    spool = Spool()
    spool.add({"type": "started"})
    assert [event.n for event in spool.batch()] == [1]
    for n in range(1, 10_001):
        spool.add({"type": "step", "step": n})
        if n % 1_000 == 0:
            spool.add({"type": "checkpointed", "step": n})
    events = spool.rest()
    assert len(events) <= 1_002
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    kept = [event.event["step"] for event in events if event.event["type"] == "checkpointed"]
    assert kept == list(range(1_000, 10_001, 1_000))
    steps = [event.event["step"] for event in events if event.event["type"] == "step"]
    assert steps == sorted(steps)
    assert steps[-1] == 10_000
    assert steps[0] == 1


def test_a_batch_of_large_events_stays_under_the_api_s_limit() -> None:
    spool = Spool()
    for _ in range(200):
        spool.add({"type": "notice"}, 60_000)
    batch = spool.batch()
    assert 1 < len(batch) <= 70
    assert spool.accept(batch[-1].n)
    assert spool.batch()[0].n == len(batch) + 1

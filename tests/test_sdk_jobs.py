"""Following jobs, uploads and chats over a wire that breaks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdk_fixtures import Wire, drop, event, job, reply, serving, stream
from tuning_sdk import (
    ConnectionError,
    Job,
    NotFoundError,
    TimeoutError,
    TuningAPIError,
    TuningClient,
    ValidationError,
)

EVENTS = "GET /jobs/a1b2c3d4/events"
ONE_JOB = "GET /jobs/a1b2c3d4"
LOGS = "GET /jobs/a1b2c3d4/logs"
CHAT = "POST /v1/chat/completions"


@pytest.fixture
def wire() -> Iterator[Wire]:
    with serving() as wire:
        yield wire


@pytest.fixture
def client(wire: Wire) -> Iterator[TuningClient]:
    with TuningClient(api_key="sk-one", base_url=wire.url, timeout=5) as client:
        client.transport.sleep = lambda seconds: None
        yield client


def test_a_stream_cut_in_the_middle_goes_on_where_it_broke(
    client: TuningClient, wire: Wire
) -> None:
    half = event(3, loss=0.5)[:25]
    wire.on(
        EVENTS,
        stream(": keep-alive\n\n", event(1, "queued"), event(2), half, is_cut=True),
        drop,
        reply({"detail": "starting"}, 503),
        stream(event(2), event(3, loss=0.5), event(4, "succeeded", note="끝 🎉")),
    )
    found = list(client.jobs.events("a1b2c3d4"))
    assert [one.seq for one in found] == [1, 2, 3, 4]
    assert found[2].data == {"loss": 0.5}
    assert found[3].data["note"] == "끝 🎉"
    assert [one.headers["last-event-id"] for one in wire.of(EVENTS)] == ["0", "2", "2", "2"]


def test_the_server_s_own_words_on_a_stream_are_no_events(client: TuningClient, wire: Wire) -> None:
    closing = "retry: 1500\nevent: server_closing\ndata: {}\n\n"
    reset = 'id: 0-a1b2c3d4\nevent: reset\ndata: {"state": "running", "first_seq": 1}\n\n'
    wire.on(ONE_JOB, reply(job("running")))
    wire.on(EVENTS, stream(event(1), closing), stream(reset, event(1), event(2, "succeeded")))
    # told anew: this server knows a job whose story is another one's
    assert [one.seq for one in client.jobs.events("a1b2c3d4")] == [1, 1, 2]
    wire.on(EVENTS, stream(reset, event(1), event(2, "succeeded")))
    assert [one.seq for one in client.jobs.events("a1b2c3d4", after=1)] == [2]


def test_a_server_that_was_there_is_given_time_for_a_restart(
    client: TuningClient, wire: Wire
) -> None:
    away = [drop, reply({"detail": "closing"}, 503)] * 4
    wire.on(ONE_JOB, reply(job("running")), *away, reply(job("completed")))
    assert client.jobs.get("a1b2c3d4").status == "running"
    assert client.jobs.get("a1b2c3d4").status == "completed"
    assert len(wire.of(ONE_JOB)) == 10


def test_a_stream_that_ends_early_is_opened_again_while_the_job_runs(
    client: TuningClient, wire: Wire
) -> None:
    wire.on(EVENTS, stream(event(1)), stream(), stream(event(2)))
    wire.on(ONE_JOB, reply(job()), reply(job()), reply(job("cancelled")))
    assert [one.seq for one in client.jobs.events("a1b2c3d4")] == [1, 2]


def test_events_of_no_job_are_not_found(client: TuningClient, wire: Wire) -> None:
    wire.on(EVENTS, reply({"detail": "no job"}, 404))
    with pytest.raises(NotFoundError):
        list(client.jobs.events("a1b2c3d4"))
    assert len(wire.asked) == 1


def test_a_server_that_stays_away_ends_the_stream(client: TuningClient, wire: Wire) -> None:
    wire.on(EVENTS, drop)
    with pytest.raises(ConnectionError):
        list(client.jobs.events("a1b2c3d4"))
    assert len(wire.asked) == 4


def test_events_can_begin_later(client: TuningClient, wire: Wire) -> None:
    wire.on(EVENTS, stream(event(8), event(9, "failed", message="no")))
    assert [one.seq for one in client.jobs.events("a1b2c3d4", after=8)] == [9]


def test_waiting_shows_each_change_once(client: TuningClient, wire: Wire) -> None:
    wire.on(ONE_JOB, *map(reply, [job(), job(), job(progress=0.75), job("completed")]))
    seen: list[Job] = []
    final = client.jobs.wait("a1b2c3d4", on_progress=seen.append)
    assert [one.progress for one in seen] == [0.5, 0.75, 1.0]
    assert final.is_successful
    assert final.duration == 62
    assert seen[0].duration is None


def test_waiting_ends_at_its_limit(client: TuningClient, wire: Wire) -> None:
    wire.on(ONE_JOB, reply(job()))
    with pytest.raises(TimeoutError, match="still running"):
        client.jobs.wait("a1b2c3d4", timeout=0)


def test_a_cancelled_job_that_still_stops_has_not_ended() -> None:
    stopping = Job.of(job("cancelled", completed_at=None))
    assert stopping.is_cancelled
    assert not stopping.is_terminal


def test_fields_of_a_newer_server_are_kept() -> None:
    found = Job.of(job(colour="푸른"))
    assert found.model_dump()["colour"] == "푸른"


def test_a_log_is_followed_without_gap_or_repetition(client: TuningClient, wire: Wire) -> None:
    lines = [f"줄 {number}" for number in range(400)]

    def tail(count: int, last: int) -> dict[str, Any]:
        return {"job_id": "a1b2c3d4", "logs": lines[:count][-last:], "total_lines": count}

    waiting = {"job_id": "a1b2c3d4", "logs": ["waiting for room"], "total_lines": 1}
    wire.on(ONE_JOB, reply(job("pending", started_at=None)), *[reply(job())] * 3)
    wire.on(ONE_JOB, reply(job("completed")))
    wire.on(LOGS, *map(reply, [waiting, tail(5, 3), tail(5, 200), tail(390, 200), tail(390, 385)]))
    wire.on(LOGS, reply(tail(400, 200)))
    assert list(client.jobs.follow_logs("a1b2c3d4", tail=3)) == lines[2:]


def test_an_upload_is_streamed_and_told(client: TuningClient, wire: Wire, tmp_path: Path) -> None:
    stored = {"dataset_path": "data/훈련.jsonl", "num_samples": 3, "format": "alpaca", "size": 9}
    wire.on("POST /upload/dataset", drop, reply(stored))
    source = tmp_path / "훈련 set.jsonl"
    source.write_bytes(b'{"a": "\xf0\x9f\x8c\xb2"}\n' * 20_000)
    told: list[tuple[int, int]] = []
    found = client.datasets.upload(source, lambda sent, size: told.append((sent, size)))
    size = source.stat().st_size
    assert found.dataset_path == "data/훈련.jsonl"
    assert told[-1] == (size, size)
    assert len(told) > 2
    asked = wire.of("POST /upload/dataset")
    assert source.read_bytes() in asked[-1].body
    assert "훈련 set.jsonl".encode() in asked[-1].body
    assert len({one.headers["idempotency-key"] for one in asked}) == 1


def test_a_faulty_upload_names_its_lines(client: TuningClient, wire: Wire, tmp_path: Path) -> None:
    wire.on("POST /upload/dataset", reply({"detail": [{"line": 2, "msg": "not JSON"}]}, 422))
    source = tmp_path / "x.jsonl"
    source.write_text("{}\n{\n")
    with pytest.raises(ValidationError, match="2: not JSON"):
        client.datasets.upload(source)
    with pytest.raises(FileNotFoundError):
        client.datasets.upload(tmp_path / "none")


def test_a_chat_comes_in_pieces(client: TuningClient, wire: Wire) -> None:
    def chunk(text: str | None, **delta: str) -> str:
        choice = {"index": 0, "delta": {**delta, **({"content": text} if text else {})}}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    parts = [chunk(None, role="assistant"), chunk("안"), chunk("녕 "), chunk("🌊")]
    usage = 'data: {"choices": [], "usage": {}}\n\n'
    wire.on(CHAT, stream(*parts, usage, "data: [DONE]\n\n"))
    pieces = client.chat("m", [{"role": "user", "content": "你好"}], temperature=0)
    assert list(pieces) == ["안", "녕 ", "🌊"]
    assert wire.asked[0].json["stream"] is True
    assert wire.asked[0].json["messages"][0]["content"] == "你好"


def test_an_error_inside_a_chat_is_raised(client: TuningClient, wire: Wire) -> None:
    error = {"message": "the engine was lost", "type": "server_error", "code": "internal"}
    wire.on(CHAT, stream(f"data: {json.dumps({'error': error})}\n\n"))
    with pytest.raises(TuningAPIError, match="the engine was lost"):
        list(client.chat("m", []))


def test_a_chat_that_breaks_off_is_no_whole_answer(client: TuningClient, wire: Wire) -> None:
    begun = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    wire.on(CHAT, stream(begun, is_cut=True))
    pieces = client.chat("m", [])
    assert next(pieces) == "half"
    with pytest.raises(ConnectionError):
        next(pieces)


def test_a_refusal_of_a_chat_is_the_servers_own(client: TuningClient, wire: Wire) -> None:
    wire.on(CHAT, reply({"error": {"message": "no model 'm'", "code": "not_found"}}, 404))
    with pytest.raises(NotFoundError, match="no model 'm'"):
        list(client.chat("m", []))

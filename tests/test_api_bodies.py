"""Bodies made to break the server: each is a client's mistake, told as one, and told at once."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from api_fixtures import ASKED, ONE, hub_of, make_workspace, open_door
from tunesmith.api import stream

JSON = {"Content-Type": "application/json"}
HOSTILE = {
    "not a number": b'{"num_epochs": NaN}',
    "infinite": b'{"num_epochs": 1e999}',
    "half a character": b'{"model_name": "\\ud800"}',
    "half a character in UTF-8": b'{"model_name": "\xed\xa0\x80"}',
    "half a character as a name": b'{"\\udc00": 1}',
    "bottomless list": b"[" * 100_000,
    "bottomless object": b'{"a":' * 50_000,
    "5000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "4000 digits": b'{"seed": ' + b"9" * 4000 + b"}",
    "UTF-16": json.dumps(ASKED).encode("utf-16"),
    "null": b"null",
    "a list": b"[]",
    "cut off": b'{"model_name": "mod',
    "nothing": b"",
    "many fields": b"{" + b",".join(b'"k%d": 1' % i for i in range(50_000)) + b"}",
    "many targets": json.dumps(ASKED | {"lora_target_modules": ["q"] * 50_000}).encode(),
    "unknown field": json.dumps(ASKED | {"owner": "me", "fence": 9}).encode(),
}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    place = make_workspace(tmp_path_factory.mktemp("bodies"))
    with open_door(place, max_json_bytes=1 << 20, max_chat_bytes=1 << 20) as door:
        yield door


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_training_request_is_told_what_is_wrong(door: TestClient, name: str) -> None:
    answer = door.post("/train/sft", content=HOSTILE[name], headers=JSON)
    assert answer.status_code == 422
    fault = answer.json()["detail"][0]
    assert fault["loc"][0] == "body"
    assert fault["msg"]
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chat_is_refused_before_an_engine_is_asked(door: TestClient, name: str) -> None:
    answer = door.post("/v1/chat/completions", content=HOSTILE[name], headers=JSON | ONE)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "", "a/b;" * 200])
def test_a_body_of_another_kind_is_refused(door: TestClient, kind: str) -> None:
    sent = door.post("/train/sft", content=json.dumps(ASKED), headers={"Content-Type": kind})
    assert sent.status_code == 422
    assert "application/json" in sent.json()["detail"][0]["msg"]


def test_a_packed_body_is_not_unpacked(door: TestClient) -> None:
    packed = door.post("/train/sft", json=ASKED, headers={"Content-Encoding": "gzip"})
    assert packed.status_code == 415


def test_a_body_over_the_limit_is_refused_with_its_limit(door: TestClient) -> None:
    for path in ("/train/sft", "/v1/completions"):
        whole = door.post(path, content=b" " * (2 << 20), headers=JSON | ONE)
        assert whole.status_code == 413
        assert "1048576 bytes" in whole.text
        in_pieces = door.post(path, content=iter([b" " * 65_536] * 40), headers=JSON | ONE)
        assert in_pieces.status_code == 413


def test_the_last_of_two_fields_of_one_name_counts(door: TestClient) -> None:
    body = b'{"model_name": "models/tiny", "model_name": "nope", "dataset_path": "data/chat.jsonl"}'
    answer = door.post("/train/sft", content=body, headers=JSON)
    assert answer.status_code == 404
    assert "nope" in answer.text


@pytest.mark.parametrize(
    "query",
    [
        "/jobs?limit=-1",
        "/jobs?limit=" + "9" * 5000,
        "/jobs?offset=-1",
        "/jobs?limit=1e3",
        "/jobs?status=x",
        "/jobs/00000000/events?after=" + "9" * 33,
        "/jobs/" + "a" * 65,
    ],
)
def test_numbers_in_a_query_are_bounded(door: TestClient, query: str) -> None:
    assert door.get(query).status_code == 422


@pytest.mark.parametrize("job", ["%00", "%ff", "..%2f..", "%ED%A0%80", "' OR 1=1--", "ftjob-job-x"])
def test_whatever_is_no_job_is_not_found(door: TestClient, job: str) -> None:
    assert door.get(f"/jobs/{job}").status_code == 404


@pytest.mark.parametrize(
    "model", ["%00", "%2e%2e/x", "x" * 5000, "%2fetc%2fpasswd", ".tunesmith", "ft:a:b:%00", "data"]
)
def test_whatever_is_no_model_is_told_so(door: TestClient, model: str) -> None:
    answer = door.get(f"/v1/models/{model}", headers=ONE)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]


def test_a_hundred_posts_with_one_key_make_one_job(door: TestClient) -> None:
    headers = {"Idempotency-Key": "once"}
    with ThreadPoolExecutor(20) as pool:
        sent = [
            pool.submit(door.post, "/train/sft", json=ASKED, headers=headers) for _ in range(100)
        ]
        answers = [one.result() for one in sent]
    assert {one.status_code for one in answers} == {200}
    assert len({one.json()["job_id"] for one in answers}) == 1
    other = door.post("/train/sft", json=ASKED | {"seed": 1}, headers=headers)
    assert other.status_code == 422


@pytest.mark.parametrize("key", ["k" * 256, "a\tb", "\u00e9"])
def test_an_odd_idempotency_key_is_refused(door: TestClient, key: str) -> None:
    headers = [(b"idempotency-key", key.encode("latin-1"))]
    answer = door.post("/train/sft", json=ASKED, headers=headers)
    assert answer.status_code in (400, 422)


def test_a_log_of_bytes_is_shown_as_lines_of_text(door: TestClient) -> None:
    job_id = door.post("/train/sft", json=ASKED).json()["job_id"]
    log = hub_of(door).log_path(job_id)
    log.parent.mkdir(parents=True)
    log.write_bytes(
        b"first\n\x1b[31mred\x1b[0m\n10%\r20%\r100%\r\n\xff\x00bin\r\n\n"
        + b"x" * 1_000_000
        + "\n한글 🎉\nunfinished".encode()
    )
    everything = door.get(f"/jobs/{job_id}/logs?tail=0").json()
    assert everything["total_lines"] == len(everything["logs"]) == 7
    assert everything["logs"][1:5] == ["\\x1b[31mred\\x1b[0m", "100%", "\ufffd\\x00bin", ""]
    assert len(everything["logs"][5]) <= 64 << 10
    for tail, wanted in ((1, 1), (3, 3), (10**9, 7)):
        shown = door.get(f"/jobs/{job_id}/logs?tail={tail}").json()
        assert shown["logs"] == everything["logs"][-wanted:]
        assert shown["total_lines"] == 7


def test_no_secret_place_is_named_in_an_error(tmp_path: Path) -> None:
    with open_door(make_workspace(tmp_path)) as door:
        hub_of(door).store.write(lambda tx: tx.execute(text("drop table jobs"))).result()
        answer = door.get("/jobs")
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the server failed; its log says more"}


def test_a_reader_that_reads_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SEND_SECONDS", 0.05)
    closed = []

    async def endless() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            closed.append(True)

    async def listen() -> dict[str, Any]:
        await asyncio.sleep(3600)
        raise AssertionError

    async def refuse(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def serve() -> None:
        await stream.EventStream(endless())({"type": "http"}, listen, refuse)
        await asyncio.sleep(0)

    asyncio.run(serve())
    assert closed == [True]

"""Uploads with bad intent: odd names, broken frames, too much of everything."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ROW, TWO, hub_of, make_workspace, open_door

LIMIT = 1 << 20
FRAMED = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = b'Content-Disposition: form-data; name="file"'


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    place = make_workspace(tmp_path_factory.mktemp("uploads"))
    with open_door(place, max_upload_bytes=LIMIT) as door:
        yield door


def part(disposition: bytes, body: bytes = ROW * 3) -> bytes:
    return b"--x\r\n" + disposition + b"\r\n\r\n" + body + b"\r\n--x--\r\n"


def named(name: str, body: bytes = ROW * 3) -> bytes:
    return part(FILE + b'; filename="' + name.encode() + b'"', body)


def post(door: TestClient, body: Any, **headers: str) -> Any:
    return door.post("/upload/dataset", content=body, headers=FRAMED | headers)


def parts_left(door: TestClient) -> list[Path]:
    return list((hub_of(door).settings.home / "blobs").glob("*.part"))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("한글 데이터.jsonl", "한글 데이터.jsonl"),
        ("🎉👩\u200d👧.jsonl", "🎉👩\u200d👧.jsonl"),
        ("\u202elnosj.jsonl", "lnosj.jsonl"),
        ("../../etc/x1.jsonl", "x1.jsonl"),
        ("..\\\\..\\\\x2.jsonl", "x2.jsonl"),
        (".hidden.jsonl", "hidden.jsonl"),
        ("a\x00b.jsonl", "ab.jsonl"),
        ("가" * 200 + ".jsonl", "가" * 64 + ".jsonl"),
        ("e\u0301.jsonl", "é.jsonl"),
        ("-rf.JSONL", "-rf.JSONL"),
    ],
)
def test_an_odd_name_is_made_harmless(door: TestClient, name: str, kept: str) -> None:
    answer = post(door, named(name, ROW + name.encode("utf-8", "ignore")[:0]))
    assert answer.status_code == 200, answer.text
    assert answer.json()["dataset_path"] == f"data/{kept}"


@pytest.mark.parametrize("name", ["", "   ", ".jsonl", "a.exe", "a.jsonl.", "jsonl", "a.jsonl/.."])
def test_a_name_that_tells_no_kind_is_refused(door: TestClient, name: str) -> None:
    assert post(door, named(name)).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        os.urandom(100_000),
        named("a.jsonl")[:-14],
        part(FILE),
        part(b"X-Nothing: here"),
        part(b'Content-Disposition: form-data; name="other"; filename="a.jsonl"'),
        part(FILE + b'; filename="a\r\nX: b.jsonl"'),
        part(FILE + b'; filename="' + b"x" * 50_000 + b'.jsonl"'),
        b"".join(part(b'Content-Disposition: form-data; name="f"')[:-7] for _ in range(5000)),
        b"--x\r\n" + b"A: b\r\n" * 50_000 + b"\r\nv\r\n--x--\r\n",
        part(b'Content-Disposition: form-data; name="other"', b"v" * 500_000),
        named("a.jsonl")[:-4] + b"\r\n" + named("b.jsonl"),
        named("e.jsonl", b""),
        named("e.jsonl", os.urandom(5000)),
        named("e.json", b"[" * 50_000),
        named("e.jsonl", b'{"prompt": "\\ud800", "completion": "x"}\n'),
    ],
    ids=range(17),
)
def test_a_broken_upload_is_told_so_and_leaves_nothing(door: TestClient, body: bytes) -> None:
    blobs = hub_of(door).settings.home / "blobs"
    before = set(blobs.iterdir()) if blobs.exists() else set()
    answer = post(door, body)
    assert answer.status_code in (400, 422)
    assert "file" in answer.text
    assert set(blobs.iterdir()) == before


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "a/b"])
def test_a_body_without_a_frame_is_refused(door: TestClient, kind: str) -> None:
    assert post(door, named("a.jsonl"), **{"Content-Type": kind}).status_code == 422


def test_an_upload_over_the_limit_leaves_nothing(door: TestClient) -> None:
    a_little = post(door, named("big.jsonl", ROW * (LIMIT // len(ROW) + 10)))
    far = post(door, named("big.jsonl", ROW * (4 * LIMIT // len(ROW))))
    pieces = iter([named("big.jsonl", b"")[:-9], *[ROW * 1000] * 50])
    in_pieces = post(door, pieces)
    assert [one.status_code for one in (a_little, far, in_pieces)] == [413, 413, 413]
    assert parts_left(door) == []


def test_an_upload_is_not_spooled_elsewhere(
    door: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes go to the workspace alone: the folder for temporary files may be memory."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    rows = ROW * (LIMIT // len(ROW) - 10)
    answer = post(door, named("large.jsonl", rows))
    assert answer.status_code == 200
    assert answer.json()["size"] == len(rows)


def test_uploads_of_one_name_at_once_are_all_kept(door: TestClient) -> None:
    with ThreadPoolExecutor(10) as pool:
        bodies = [named("same.jsonl", ROW * (i + 1)) for i in range(20)]
        answers = list(pool.map(lambda body: post(door, body), bodies))
    assert {one.status_code for one in answers} == {200}
    assert len({one.json()["dataset_path"] for one in answers}) == 20


def test_an_upload_does_not_take_the_name_of_a_file_in_the_workspace(door: TestClient) -> None:
    """`data/chat.jsonl` would mean that file, and other rows would be trained on."""
    first, again = (post(door, named("chat.jsonl", ROW * 5)).json() for _ in range(2))
    assert first["dataset_path"] == again["dataset_path"] == "data/chat-2.jsonl"
    asked = {"model_name": "models/tiny", "dataset_path": first["dataset_path"]}
    job_id = door.post("/train/sft", json=asked).json()["job_id"]
    (job,) = [one for one in hub_of(door).store.read(lambda tx: _all(tx)) if one.id == job_id]
    assert Path(job.dataset.path).read_bytes() == ROW * 5


def test_another_owner_does_not_see_an_upload(door: TestClient) -> None:
    mine = post(door, named("mine.jsonl")).json()["dataset_path"]
    asked = {"model_name": "models/tiny", "dataset_path": mine}
    assert door.post("/train/sft", json=asked, headers=TWO).status_code == 404


def _all(tx: Any) -> Any:
    from tunesmith.store import jobs

    return jobs.list_jobs(tx)

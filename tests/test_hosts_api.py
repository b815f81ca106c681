"""The API's side of workers on other hosts: what they may fetch, send, and say."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.engine import Connection
from starlette.testclient import TestClient

from api_fixtures import hub_of, make_adapter, make_workspace, open_door
from far import Attempt, bearer, checkpointed, offer, sealed
from tunesmith import manifest
from tunesmith.store.tables import jobs

LIMITS: dict[str, Any] = {
    "max_artifact_bytes": 1 << 20,
    "max_log_bytes": 8192,
    "reaper_seconds": 0.2,
}


def _expire(tx: Connection, job_id: str) -> None:
    """The reaper finds the job's lease lapsed."""
    tx.execute(update(jobs).where(jobs.c.id == job_id).values(lease_until=0.0))


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    workspace = make_workspace(tmp_path_factory.mktemp("house"))
    with open_door(workspace, **LIMITS) as door:
        yield door


@pytest.fixture
def attempt(door: TestClient) -> Iterator[Attempt]:
    made = Attempt(door)
    yield made
    made.post("finish", {"kind": "failed", "failure_class": "user_error", "message": "over"})


def test_inputs_are_listed_with_sizes_and_digests_and_fetched_by_digest(attempt: Attempt) -> None:
    listing = attempt.get("inputs").json()
    names = {file["name"] for file in listing["model"]["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    for file in [*listing["model"]["files"], listing["dataset"]]:
        body = attempt.get(f"files/{file['sha256']}").content
        assert len(body) == file["size"]
        assert hashlib.sha256(body).hexdigest() == file["sha256"]
    assert listing["model"]["name"] == attempt.given["inputs"]["model"]
    assert listing["base"] is None


def test_a_file_is_gone_on_with_from_any_byte(attempt: Attempt) -> None:
    file = attempt.get("inputs").json()["dataset"]
    whole = attempt.get(f"files/{file['sha256']}").content
    rest = attempt.get(f"files/{file['sha256']}", Range="bytes=100-")
    assert rest.status_code == 206
    assert rest.content == whole[100:]
    assert attempt.get(f"files/{file['sha256']}", Range="bytes=99999999-").status_code == 416


def test_an_attempt_gets_its_own_files_and_no_others(attempt: Attempt, door: TestClient) -> None:
    workspace = hub_of(door).workspace
    (workspace / "secret.txt").write_text("of the house")
    stranger = hashlib.sha256(b"of the house").hexdigest()
    assert attempt.get(f"files/{stranger}").status_code == 404
    for path in ("files/..%2f..%2fdb.sqlite", "files/" + "0" * 63, "checkpoints/" + "0" * 64):
        assert attempt.get(path).status_code in (404, 405, 422)
    other = Attempt(door, "other")
    assert other.get("inputs").status_code == 200
    other.token = attempt.token
    assert other.get("inputs").status_code == 401


def test_an_adapter_comes_with_its_base_under_the_name_it_calls_it(door: TestClient) -> None:
    workspace = hub_of(door).workspace
    make_adapter(workspace / "models" / "강물", str(workspace / "models" / "tiny"))
    listing = Attempt(door, "adapted", model_name="models/강물").get("inputs").json()
    assert [file["name"] for file in listing["model"]["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert listing["base"]["name"] == str(workspace / "models" / "tiny")
    assert "model.safetensors" in {file["name"] for file in listing["base"]["files"]}


def test_a_checkpoint_arrives_in_pieces_and_is_there_for_the_next_attempt(
    attempt: Attempt, tmp_path: Path
) -> None:
    folder = sealed(tmp_path / "made", **{"model/가중치.bin": b"x" * 5000, "empty": b""})
    path = attempt.send(folder)
    assert path == str(attempt.folder / "checkpoints" / "step-5")
    manifest.verify(Path(path))
    made = checkpointed(path, folder)
    assert attempt.report(made).status_code == 200
    listing = attempt.get(f"checkpoints/{made['manifest_sha256']}").json()
    assert {file["name"] for file in listing["files"]} == {
        "model/가중치.bin",
        "empty",
        "manifest.json",
    }
    for file in listing["files"]:
        assert (
            attempt.get(f"files/{file['sha256']}").content == (folder / file["name"]).read_bytes()
        )


def test_an_upload_goes_on_where_it_broke_off(attempt: Attempt, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "made", a=b"a" * 10, b=b"b" * 20, c=b"c" * 30)
    told = offer(folder)
    sha256 = hashlib.sha256(told["manifest"].encode()).hexdigest()
    assert attempt.post("uploads", told).json()["missing"] == [0, 1, 2]
    assert attempt.put(f"uploads/{sha256}/1", b"b" * 20).status_code == 204
    assert attempt.post("uploads", told).json()["missing"] == [0, 2]
    refused = attempt.post(f"uploads/{sha256}/commit")
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] != "fenced"
    assert not (attempt.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("body", "digest"),
    [(b"b" * 19, None), (b"b" * 21, None), (b"c" * 20, hashlib.sha256(b"b" * 20).digest())],
)
def test_a_piece_that_is_not_as_it_was_sent_is_refused(
    attempt: Attempt, tmp_path: Path, body: bytes, digest: bytes | None
) -> None:
    folder = sealed(tmp_path / "made", b=b"b" * 20)
    told = offer(folder)
    sha256 = hashlib.sha256(told["manifest"].encode()).hexdigest()
    attempt.post("uploads", told)
    assert attempt.put(f"uploads/{sha256}/0", body, digest).status_code in (400, 413)
    assert attempt.post("uploads", told).json()["missing"] == [0]


def test_what_is_not_what_its_manifest_says_gets_no_name(attempt: Attempt, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "made", b=b"b" * 20)
    told = offer(folder)
    sha256 = hashlib.sha256(told["manifest"].encode()).hexdigest()
    attempt.post("uploads", told)
    assert attempt.put(f"uploads/{sha256}/0", b"c" * 20).status_code == 204
    assert attempt.post(f"uploads/{sha256}/commit").status_code == 400
    assert not (attempt.folder / "checkpoints" / "step-5").exists()
    assert attempt.send(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("../up", "/etc/passwd", "a/../../b", "a//b", "./a", "", "a\\b", "a\0b", "a\nb"),
        *("manifest.json", "manifest.json/a", "d/" * 20 + "a", "가" * 100),
    ],
)
def test_names_that_lead_elsewhere_are_refused(attempt: Attempt, name: str) -> None:
    files = [{"path": name, "size": 1, "sha256": "0" * 64}]
    told = {"kind": "checkpoint", "step": 1, "manifest": _manifest(files)}
    assert attempt.post("uploads", told).status_code in (400, 422)


@pytest.mark.parametrize(
    "files",
    [
        [{"path": "a", "size": 1 << 21, "sha256": "0" * 64}],
        [{"path": "a", "size": -1, "sha256": "0" * 64}],
        [{"path": "a", "size": 1, "sha256": "0" * 64}] * 2,
        [
            {"path": "a", "size": 1, "sha256": "0" * 64},
            {"path": "a/b", "size": 1, "sha256": "0" * 64},
        ],
        [{"path": f"{at}", "size": 0, "sha256": "0" * 64} for at in range(10_001)],
        "nothing",
    ],
)
def test_a_manifest_out_of_bounds_is_refused(attempt: Attempt, files: Any) -> None:
    told = {"kind": "checkpoint", "step": 1, "manifest": _manifest(files)}
    assert attempt.post("uploads", told).status_code in (400, 422)
    assert not list(attempt.folder.glob(".incoming/*/files/*"))


def _manifest(files: Any) -> str:
    return json.dumps({"format": 1, "kind": "checkpoint", "files": files, "detail": {}})


def test_a_checkpoint_that_is_told_of_but_did_not_come_is_not_accepted(
    attempt: Attempt, tmp_path: Path
) -> None:
    folder = sealed(tmp_path / "made")
    path = str(attempt.folder / "checkpoints" / "step-5")
    elsewhere = str(tmp_path / "checkpoints" / "step-5")
    attempt.report(checkpointed(path, folder), checkpointed(elsewhere, folder))
    job = attempt.door.get(f"/jobs/{attempt.job_id}").json()
    assert job["checkpoint_step"] is None
    said = attempt.hub.events_after(attempt.job_id, 0)
    codes = [event.data.get("code") for event in said if event.type == "notice"]
    assert codes == ["checkpoint_rejected"] * 2


def test_only_as_many_checkpoints_stay_as_the_job_keeps(attempt: Attempt, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = sealed(tmp_path / f"made-{step}", a=bytes([step]) * 10)
        path = attempt.send(folder, step=step)
        attempt.report(checkpointed(path, folder, step), first=step)
    kept = sorted(path.name for path in (attempt.folder / "checkpoints").iterdir())
    assert kept == ["step-2", "step-3"]


def test_a_fenced_attempt_sends_and_fetches_nothing(attempt: Attempt, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "made")
    told = offer(folder)
    sha256 = hashlib.sha256(told["manifest"].encode()).hexdigest()
    attempt.post("uploads", told)
    zombie = (attempt.fence, attempt.token)
    attempt.hub.store.write(lambda tx: _expire(tx, attempt.job_id)).result()
    attempt.name = "another"
    attempt.claim()
    assert attempt.fence == zombie[0] + 1
    mine = (attempt.fence, attempt.token)
    attempt.fence, attempt.token = zombie
    answers = [
        attempt.put(f"uploads/{sha256}/0", b"0" * 100),
        attempt.post("uploads", told),
        attempt.post(f"uploads/{sha256}/commit"),
        attempt.post("log?offset=0", b"words"),
        attempt.get("inputs"),
        attempt.post("finish", {"kind": "stopped"}),
    ]
    attempt.fence, attempt.token = mine
    assert [answer.status_code for answer in answers] == [409] * len(answers)
    assert {answer.json()["error"]["code"] for answer in answers} == {"fenced"}
    attempt.hub.depot.clear()
    left = [path for path in attempt.folder.parent.rglob("*") if path.is_file()]
    assert left == []


def test_log_lines_sent_twice_are_stored_once(attempt: Attempt) -> None:
    first, second = "강물 flows\n".encode(), "바위 🌊\n".encode()
    assert attempt.post("log?offset=0", first).json() == {"offset": len(first)}
    assert attempt.post("log?offset=0", first + second).json() == {"offset": len(first + second)}
    assert attempt.post("log?offset=0", first).json() == {"offset": len(first + second)}
    gap = attempt.post(f"log?offset={len(first + second) + 5}", b"lost")
    assert gap.json() == {"offset": len(first + second)}
    place = attempt.hub.log_path(attempt.job_id)
    assert place.read_bytes() == first + second


def test_a_log_that_was_half_noted_before_a_crash_holds_every_byte_once(attempt: Attempt) -> None:
    attempt.post("log?offset=0", b"one\n")
    place = attempt.hub.log_path(attempt.job_id)
    with place.open("ab") as log:  # stored, but the crash came before that was noted
        log.write(b"two\n")
    attempt.post("log?offset=4", b"two\nthree\n")
    assert place.read_bytes() == b"one\ntwo\nthree\n"


def test_a_long_log_stays_under_its_cap_with_its_beginning_and_its_end(attempt: Attempt) -> None:
    lines = [f"line {at:06d}\n".encode() for at in range(2000)]
    offset = 0
    for start in range(0, 2000, 100):
        body = b"".join(lines[start : start + 100])
        offset = attempt.post(f"log?offset={offset}", body).json()["offset"]
    assert offset == sum(map(len, lines))
    kept = attempt.hub.log_path(attempt.job_id).read_bytes()
    assert len(kept) <= 8192
    assert kept.startswith(lines[0])
    assert kept.endswith(lines[-1])
    assert kept.count(b"truncated") == 1


def test_a_worker_key_opens_the_workers_routes_and_nothing_else(
    attempt: Attempt, door: TestClient
) -> None:
    key = bearer(attempt.key)
    assert door.get("/internal/v1/house", headers=key).status_code == 200
    for method, path in [
        *(("GET", "/jobs"), ("POST", "/train/sft"), ("GET", "/v1/models")),
        *(("GET", "/internal/v1/keys"), ("POST", "/internal/v1/keys")),
        *(("POST", "/internal/v1/engines/x"), ("GET", "/internal/v1/models")),
    ]:
        assert door.request(method, path, headers=key).status_code == 403, path
    assert door.get("/internal/v1/house", headers=bearer("sk-none")).status_code == 401
    user = bearer(hub_of(door).make_key("somebody")["key"])
    assert door.get("/internal/v1/house", headers=user).status_code == 403


def test_a_worker_key_alone_does_not_close_the_house_to_who_sits_at_it(tmp_path: Path) -> None:
    with open_door(tmp_path) as door:
        hub_of(door).make_key("hosts", is_worker=True)
        assert door.get("/jobs").status_code == 200

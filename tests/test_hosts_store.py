"""Checkpoints and models of other hosts in an object store: signed addresses, notes, clearing."""

import base64
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from api_fixtures import hub_of, make_workspace, open_door
from far import Attempt, checkpointed, offer, pieces, sealed
from servers import free_port, wait_for
from tunesmith import manifest
from tunesmith.errors import BadRequestError
from tunesmith.store.objects import Objects

URL = "s3://models/한국/tunesmith"


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def has_bucket() -> bool:
        try:
            return httpx2.put(f"{address}/models", trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            wait_for(has_bucket, "the object store")
            yield
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def door(store: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    workspace = make_workspace(tmp_path_factory.mktemp("house"))
    with open_door(workspace, object_store_url=URL) as door:
        yield door


@pytest.fixture
def attempt(door: TestClient) -> Iterator[Attempt]:
    made = Attempt(door)
    yield made
    made.post("finish", {"kind": "failed", "failure_class": "user_error", "message": "over"})


def _put(url: str, body: bytes) -> int:
    digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
    reply = httpx2.put(url, content=body, headers={"Content-MD5": digest}, trust_env=False)
    return reply.status_code


def _begin(attempt: Attempt, folder: Path, **told: Any) -> tuple[str, dict[str, Any]]:
    body = offer(folder, **told)
    plan = attempt.post("uploads", body)
    assert plan.status_code == 200, plan.text
    return hashlib.sha256(body["manifest"].encode()).hexdigest(), plan.json()


def _send(attempt: Attempt, folder: Path, **told: Any) -> str:
    sha256, plan = _begin(attempt, folder, **told)
    for one, body in zip(plan["urls"], pieces(folder), strict=True):
        assert _put(one["url"], body) == 200
    done = attempt.post(f"uploads/{sha256}/commit")
    assert done.status_code == 200, done.text
    return str(done.json()["path"])


def _keys() -> dict[str, int]:
    return Objects.open(URL).sizes("")


def test_a_checkpoint_goes_to_the_store_and_comes_from_there(
    attempt: Attempt, tmp_path: Path
) -> None:
    folder = sealed(tmp_path / "made", **{"model/가중치": b"x" * 5000, "empty": b""})
    path = Path(_send(attempt, folder))
    assert [file.name for file in path.iterdir()] == ["stored.json"]
    made = checkpointed(str(path), folder)
    attempt.report(made)
    assert attempt.door.get(f"/jobs/{attempt.job_id}").json()["checkpoint_step"] == 5
    listing = attempt.get(f"checkpoints/{made['manifest_sha256']}").json()
    for file in listing["files"]:
        body = b"".join(httpx2.get(part["url"], trust_env=False).content for part in file["parts"])
        assert body == (folder / file["name"]).read_bytes()
    names = {file["name"] for file in listing["files"]}
    assert names == {"model/가중치", "empty", "manifest.json"}


def test_nothing_counts_before_all_of_it_is_there(attempt: Attempt, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "made", a=b"a" * 10, b=b"b" * 20)
    sha256, plan = _begin(attempt, folder)
    first, second = plan["urls"]
    assert _put(first["url"], b"a" * 10) == 200
    assert _put(second["url"], b"b" * 19) == 200
    assert attempt.post(f"uploads/{sha256}/commit").status_code == 409
    assert _begin(attempt, folder)[1]["missing"] == [1]
    assert not (attempt.folder / "checkpoints").exists()
    assert not [key for key in _keys() if key.endswith("manifest.json") and sha256 in key]
    assert _put(second["url"], b"b" * 20) == 200
    assert attempt.post(f"uploads/{sha256}/commit").status_code == 200


def test_a_model_is_brought_here_verified_and_its_objects_are_cleared_away(
    attempt: Attempt, tmp_path: Path
) -> None:
    folder = sealed(tmp_path / "made", "artifact", a=b"a" * 10)
    path = _send(attempt, folder, kind="artifact")
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    done = attempt.post(
        "finish", {"kind": "succeeded", "step": 5, "artifact": path, "manifest_sha256": digest}
    )
    assert done.status_code == 200, done.text
    job = attempt.door.get(f"/jobs/{attempt.job_id}").json()
    assert job["state"] == "succeeded"
    output = hub_of(attempt.door).workspace / job["output_dir"]
    manifest.verify(output, digest)
    hub_of(attempt.door).depot.clear()
    assert not [key for key in _keys() if digest in key]


def test_a_model_that_is_another_in_the_store_is_no_success(
    attempt: Attempt, tmp_path: Path
) -> None:
    folder = sealed(tmp_path / "made", "artifact", a=b"a" * 10)
    sha256, plan = _begin(attempt, folder, kind="artifact")
    assert _put(plan["urls"][0]["url"], b"z" * 10) == 200
    path = attempt.post(f"uploads/{sha256}/commit").json()["path"]
    attempt.post(
        "finish", {"kind": "succeeded", "step": 5, "artifact": path, "manifest_sha256": sha256}
    )
    job = attempt.door.get(f"/jobs/{attempt.job_id}").json()
    assert job["state"] == "failed"
    assert "a is missing or changed" in job["error"]


def test_what_no_note_speaks_of_is_cleared_away_and_the_rest_stays(
    attempt: Attempt, tmp_path: Path
) -> None:
    kept = sealed(tmp_path / "kept", a=b"kept")
    path = _send(attempt, kept, step=1)
    coming = sealed(tmp_path / "coming", a=b"coming")
    sha256, plan = _begin(attempt, coming, step=2)
    _put(plan["urls"][0]["url"], b"coming")
    gone = sealed(tmp_path / "gone", a=b"gone")
    manifest.remove(Path(_send(attempt, gone, step=3)))
    stranger = "another-house/0badcafe/1/" + "0" * 64 + "/0"
    Objects.open(URL).put(stranger, b"not ours")
    hub_of(attempt.door).depot.clear()
    left = {key.split("/")[3] for key in _keys() if f"/{attempt.job_id}/" in key}
    assert left == {_digest(kept), sha256}
    assert stranger in _keys()
    assert Path(path).exists()


def test_checkpoints_past_those_that_are_kept_leave_the_store(
    attempt: Attempt, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        folder = sealed(tmp_path / f"made-{step}", a=bytes([step]) * 10)
        attempt.report(checkpointed(_send(attempt, folder, step=step), folder, step), first=step)
    left = {key.split("/")[3] for key in _keys() if f"/{attempt.job_id}/" in key}
    assert left == {_digest(tmp_path / f"made-{step}") for step in (2, 3)}


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_pieces_are_not_taken_where_a_store_is(attempt: Attempt, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "made", a=b"a" * 10)
    sha256, _ = _begin(attempt, folder)
    assert attempt.put(f"uploads/{sha256}/0", b"a" * 10).status_code == 409


@pytest.mark.parametrize("url", ["s3://", "https://models", "models", "file:///etc"])
def test_an_address_that_is_no_stores_is_refused(url: str) -> None:
    with pytest.raises(BadRequestError, match="s3://bucket/prefix"):
        Objects.open(url)

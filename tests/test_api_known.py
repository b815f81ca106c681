"""What a submission remembers is never stale; its short way through the door changes nothing."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ASKED, LOCAL, ROW, hub_of, make_workspace, open_door
from tunesmith.data.reading import Reading
from tunesmith.hub.folder import read
from tunesmith.hub.known import Unknown
from tunesmith.hub.principal import Principal
from tunesmith.hub.trace import SETTLED_NS
from tunesmith.store import jobs


@pytest.fixture
def door(tmp_path: Path) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path)) as door:
        yield door


def submit(door: TestClient, key: str | None = None, **fields: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return door.post("/train/sft", json=ASKED | fields, headers=headers)


def is_known(door: TestClient) -> bool:
    """Whether the next request is answered from memory."""

    async def ask() -> bool:
        known, who = hub_of(door).known, Principal.local()
        try:
            known.base(ASKED["model_name"], who, "")
            known.pinned(ASKED["dataset_path"], who, "", Reading())
        except Unknown:
            return False
        return True

    assert door.portal
    return bool(door.portal.call(ask))


def get_known(door: TestClient) -> None:
    time.sleep(2 * SETTLED_NS / 1e9)
    submit(door).raise_for_status()
    assert is_known(door)


def sha256_of(door: TestClient, job_id: str) -> str | None:
    return hub_of(door).store.read(lambda tx: jobs.get(tx, job_id)).dataset.sha256


def test_a_data_set_that_changed_is_read_again_at_once(door: TestClient) -> None:
    place = hub_of(door).workspace / "data" / "chat.jsonl"
    place.write_bytes(ROW)
    get_known(door)
    before, found = place.stat(), sha256_of(door, submit(door).json()["job_id"])
    place.write_bytes(ROW.replace(b"a", b"c"))
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time as they were
    changed = sha256_of(door, submit(door).json()["job_id"])
    assert changed != found
    place.write_bytes(b"{not a row}\n")
    assert submit(door).status_code == 422
    place.unlink()
    assert submit(door).status_code == 404


def test_a_data_set_whose_pinned_bytes_went_is_pinned_again(door: TestClient) -> None:
    get_known(door)
    for folder in ("data", "blobs"):
        for path in (hub_of(door).settings.home / folder).iterdir():
            path.unlink()
    job_id = submit(door).json()["job_id"]
    job = hub_of(door).store.read(lambda tx: jobs.get(tx, job_id))
    assert Path(job.dataset.path).read_bytes()


def test_a_model_that_changed_is_looked_at_again_at_once(door: TestClient) -> None:
    place = hub_of(door).workspace / "models" / "tiny"
    config = (place / "config.json").read_bytes()
    get_known(door)
    (place / "config.json").write_text(json.dumps({**json.loads(config), "auto_map": {}}))
    assert "auto_map" in submit(door).text
    (place / "config.json").write_bytes(config)
    get_known(door)
    (place / "tokenizer.json").rename(place / "aside")
    assert "tokenizer.json" in submit(door).text
    (place / "aside").rename(place / "tokenizer.json")
    get_known(door)
    (place / "model.safetensors").unlink()
    assert submit(door).status_code == 400


def test_a_template_that_changed_is_another_renderer_at_once(door: TestClient) -> None:
    """`tokenizer.json` stays as it was."""
    hub = hub_of(door)
    place = hub.workspace / "models" / "tiny"
    get_known(door)
    before = hub.renderer(read(place), "chat").digest
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert hub.renderer(read(place), "chat").digest != before
    assert not is_known(door)


def test_a_folder_that_was_moved_out_behind_a_link_is_no_longer_taken(
    door: TestClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every stamp inside stays as it was; only the way there is another."""
    get_known(door)
    away = tmp_path_factory.mktemp("away")
    for name in ("models", "data"):
        place = hub_of(door).workspace / name
        place.rename(away / name)
        place.symlink_to(away / name)
        assert submit(door).status_code == 400, name
        place.unlink()
        (away / name).rename(place)
    assert submit(door).status_code == 200


# the door itself


def test_what_is_wrong_is_told_as_everywhere(door: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    empty = door.post("/train/sft", headers=json_type)
    missing = {"loc": ["body"], "msg": "Field required", "type": "missing"}
    assert (empty.status_code, empty.json()) == (422, {"detail": [missing]})
    for body in (b"null", b"[]", b'"\xec\x95\x88"', b"{}", b"\xff", b'{"model_name": NaN}'):
        answer = door.post("/train/sft", content=body, headers=json_type)
        assert answer.status_code == 422, body
        assert all(fault["loc"][0] == "body" for fault in answer.json()["detail"])
    both = door.post("/train/sft", json={"x": 1}, headers={"Idempotency-Key": "k" * 256})
    places = [fault["loc"] for fault in both.json()["detail"]]
    assert places[0] == ["header", "idempotency-key"]
    assert ["body", "x"] in places
    assert door.get("/train/sft").status_code == 405
    assert door.post("/train/sft/", json=ASKED).status_code == 307
    assert submit(door, "tab\there").status_code == 400


def test_under_a_root_path_a_job_is_taken_too(tmp_path: Path) -> None:
    with open_door(make_workspace(tmp_path)) as door:
        below = TestClient(door.app, LOCAL, root_path="/tuning", client=("127.0.0.1", 5000))
        assert below.post("/tuning/train/sft", json=ASKED).status_code == 200

"""Data sets that only the hub has: fetched at submit and pinned by content, or a sentence."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import hub_of, make_workspace, open_door
from house import chats
from hub_fixtures import Hub
from train_fixtures import write_rows
from tunesmith.hub import remote_data
from tunesmith.hub.principal import Principal


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    opened = Hub()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[TestClient]:
    place = make_workspace(tmp_path_factory.mktemp("hub-data"))
    over = {"hub_endpoint": hub.url, "should_ask_hub": True, "max_upload_bytes": 100_000}
    with open_door(place, hub_cache=place.parent / "cache", **over) as door:
        yield door


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Path:
    """`말/org`: a file for training, one for tests, and one that is about them."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train-00000-of-00001.jsonl", chats(60))
    write_rows(tmp_path / "data" / "test.jsonl", chats(5))
    (tmp_path / "dataset_infos.json").write_text("{}")
    hub.add("datasets/org/words", tmp_path)
    return tmp_path


def submit(door: TestClient, dataset: str, **more: Any) -> Any:
    asked = {"model_name": "models/tiny", "dataset_path": dataset, **more}
    return door.post("/train/sft", json=asked)


def test_a_data_set_of_the_hub_is_fetched_once_and_pinned(
    door: TestClient, hub: Hub, repo: Path
) -> None:
    for more in ({}, {"seed": 1}):
        answer = submit(door, "org/words", eval_dataset_path="org/words/data/test.jsonl", **more)
        assert answer.status_code == 200, answer.text
    job = hub_of(door).job(answer.json()["job_id"], Principal.local())
    assert job.dataset.name == "org/words"
    body = (repo / "data" / "train-00000-of-00001.jsonl").read_bytes()
    assert Path(job.dataset.path).read_bytes() == body
    assert job.eval_dataset is not None
    assert len(hub.fetched("datasets/org/words", "data/train-00000-of-00001.jsonl")) == 1
    shown = {"dataset_path": "org/words", "model_name": "models/tiny", "row": 3}
    assert door.post("/data/preview", json=shown).status_code == 200


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("org/none", 404, "has none of that name"),
        ("org/words/train.jsonl", 404, "has no 'train.jsonl': data/test.jsonl, data/train-00000"),
        ("org/words/../../x", 400, ""),
        ("data/none", 404, "not a file in the workspace"),
        ("org/none.jsonl", 404, "not a file in the workspace"),
        ("org/two", 400, "has 2 files of rows; write which one, as org/two/a.csv: a.csv, b.csv"),
        ("org/empty", 404, "has no file that ends in .jsonl"),
        ("org/large", 413, "over the 0 MB that this server takes"),
    ],
)
def test_what_the_hub_does_not_give_is_a_sentence(
    door: TestClient, hub: Hub, repo: Path, tmp_path: Path, name: str, status: int, told: str
) -> None:
    for other, files in {
        "two": ["a.csv", "b.csv"],
        "empty": ["README.md"],
        "large": ["a.txt"],
    }.items():
        folder = tmp_path / other
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes(b"x" * (200_000 if other == "large" else 5))
        hub.add(f"datasets/org/{other}", folder)
    answer = submit(door, name)
    assert answer.status_code == status, answer.text
    assert told in answer.text


def test_one_that_takes_long_is_asked_for_again(
    door: TestClient, hub: Hub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(repo / "data" / "other.jsonl", chats(3))
    (tmp_path / "slow").mkdir()
    write_rows(tmp_path / "slow" / "slow.jsonl", chats(9))
    slow = hub.add("datasets/org/slow", tmp_path / "slow")
    monkeypatch.setattr(remote_data, "PATIENCE_SECONDS", 0.2)
    slow.answered = threading.Event()
    answer = submit(door, "org/slow")
    assert answer.status_code == 503, answer.text
    assert "on its way from the hub; ask again" in answer.text
    monkeypatch.setattr(remote_data, "AT_ONCE", 1)
    answer = submit(door, "org/words/data/other.jsonl")
    assert answer.status_code == 503, answer.text
    assert "1 other data sets are on their way" in answer.text
    slow.answered.set()
    monkeypatch.setattr(remote_data, "PATIENCE_SECONDS", 60.0)
    assert submit(door, "org/slow").status_code == 200
    assert len(hub.fetched("datasets/org/slow", "slow.jsonl")) == 1


def test_a_hub_that_is_turned_off_is_not_asked_for_data(
    hub: Hub, repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = make_workspace(tmp_path_factory.mktemp("off"))
    with open_door(place, hub_endpoint=hub.url, should_ask_hub=False) as door:
        before = len(hub.asked)
        assert submit(door, "org/words").status_code == 404
        assert len(hub.asked) == before

"""What a training request may point at, and where it may write."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ASKED, ROW, hub_of, make_workspace, open_door
from tunesmith.errors import BadRequestError, ConflictError
from tunesmith.hub.data import _take_in
from tunesmith.hub.names import find_data
from tunesmith.hub.principal import Principal
from tunesmith.store import jobs
from tunesmith.store.promotion import _make_parents

PATHS = [
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "outputs/../../x",
    "..\\..\\x",
    "a\0b",
    "a\nb",
    ".tunesmith/db.sqlite",
    "./.tunesmith",
    "/proc/self/environ",
    "x" * 4096,
    "a/" * 2040,
]
FIELDS = ["model_name", "dataset_path", "output_dir", "eval_dataset_path", "resume_from"]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path_factory.mktemp("submits"))) as door:
        yield door


def submit(door: TestClient, **fields: Any) -> Any:
    return door.post("/train/sft", json=ASKED | fields)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_no_field_leads_out_of_the_workspace(door: TestClient, field: str, path: str) -> None:
    answer = submit(door, **{field: path})
    assert answer.status_code in (400, 404)
    assert answer.json()["detail"].startswith(field)


def test_links_and_special_files_are_no_data(door: TestClient, tmp_path: Path) -> None:
    data = hub_of(door).workspace / "data"
    (tmp_path / "rows.jsonl").write_bytes(ROW)
    (data / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    (data / "zero.jsonl").symlink_to("/dev/zero")
    (data / "loop.jsonl").symlink_to(data / "loop.jsonl")
    (data / "dir.jsonl").mkdir()
    os.mkfifo(data / "pipe.jsonl")
    for name in ("link", "zero", "loop", "dir", "pipe"):
        assert submit(door, dataset_path=f"data/{name}.jsonl").status_code in (400, 404), name


def test_a_folder_swapped_for_a_link_is_not_followed(door: TestClient, tmp_path: Path) -> None:
    """The path was looked at, then its folder was made a link: the open file is what counts."""
    hub = hub_of(door)
    folder = hub.workspace / "data" / "swapped"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(ROW)
    name = "data/swapped/rows.jsonl"
    found = find_data(hub.store, hub.settings, name, Principal.local())
    (tmp_path / "rows.jsonl").write_bytes(ROW * 2)
    folder.rename(folder.with_name("aside"))
    folder.symlink_to(tmp_path)
    with pytest.raises(BadRequestError):
        _take_in(hub, found.path)


@pytest.mark.parametrize(
    "place",
    [
        ".",
        "outputs",
        "outputs/training_logs",
        "outputs/training_logs/x",
        "logs",
        "data",
        "data/chat.jsonl",
        "data/chat.jsonl/x",
        "models/tiny",
        "models/tiny/inside",
        "a" * 220,
        "가" * 80,
        "/".join("d" * 40),
    ],
)
def test_a_place_that_cannot_take_a_model_is_refused_at_once(door: TestClient, place: str) -> None:
    answer = submit(door, output_dir=place)
    assert answer.status_code in (400, 409)
    assert "output_dir" in answer.text


def test_outputs_of_unfinished_jobs_do_not_overlap(door: TestClient) -> None:
    assert submit(door, output_dir="outputs/a_b/inner").status_code == 200
    for other in ("outputs/a_b", "outputs/a_b/inner", "outputs/a_b/inner/deeper"):
        answer = submit(door, output_dir=other)
        assert answer.status_code == 409, other
    assert submit(door, output_dir="outputs/axb").status_code == 200


@pytest.mark.parametrize("field", ["load_in_4bit", "load_in_8bit"])
def test_weights_of_few_bits_need_no_gpu(door: TestClient, field: str) -> None:
    answer = submit(door, **{field: True})
    assert answer.status_code == 200, answer.text
    job = hub_of(door).store.read(lambda tx: jobs.get(tx, answer.json()["job_id"]))
    assert job.needs.gpus == 0


def test_odd_but_possible_places_are_taken(door: TestClient) -> None:
    for place in ("outputs/한글 모델 🎉", "--help", "%2e%2e", "outputs/CON", "outputs/file:x"):
        assert submit(door, output_dir=place).status_code == 200, place


def test_a_place_that_became_impossible_is_told_as_a_conflict(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x" / "y", tmp_path / ("n" * 300) / "x"):
        with pytest.raises(ConflictError):
            _make_parents(place)
    with pytest.raises(ConflictError):
        _make_parents(tmp_path.joinpath(*["d"] * 1500))

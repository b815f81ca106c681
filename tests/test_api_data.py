"""Data sets through the door: tables, columns mapped by hand, rows seen as tokens."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ASKED, ONE, TWO, hub_of, make_workspace, open_door
from house import chats
from tunesmith.data.fit import Cut
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.store import jobs
from tunesmith.train.sft import SampleReader
from tunesmith.train.source import RowSource

BY_HAND = {"instruction": "question", "output": "answer"}
TABLE = "question,answer\n" + "".join(f"묻다 {at},답 {at}\n" for at in range(6))


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    place = make_workspace(tmp_path_factory.mktemp("data"))
    (place / "data" / "table.csv").write_text(TABLE)
    (place / "data" / "bad.csv").write_text(TABLE + "only one\n")
    (place / "data" / "text.txt").write_text("\n\n".join(f"문서 {at}" for at in range(9)))
    with open_door(place) as door:
        yield door


def preview(door: TestClient, **asked: Any) -> Any:
    return door.post("/data/preview", json={**ASKED, **asked})


def upload(door: TestClient, name: str, body: str, **query: str) -> Any:
    return door.post("/upload/dataset", files={"file": (name, body.encode())}, params=query)


def test_a_row_is_shown_as_the_trainer_reads_it(door: TestClient) -> None:
    place = hub_of(door).workspace
    renderer = Renderer.load(place / "models" / "tiny")
    with RowIndex.open(place / "data" / "chat.jsonl") as rows:
        source = RowSource(rows, SampleReader(renderer, Cut(1024, "drop", "completions")), None)
        source.open(0)
        for number in range(1, len(rows) + 1):
            sample = source.pull()
            found = preview(door, row=number).json()
            assert sample is not None
            assert found["ids"] == list(sample.ids)
            assert found["weights"][1:] == [int(each) for each in sample.mask[1:]]
            assert (found["row"], found["line"], found["fate"]) == (number, number, "trained")
    assert len(rows) == len(chats(8))


def test_a_preview_keeps_nothing(door: TestClient) -> None:
    blobs = hub_of(door).settings.home / "blobs"
    before = set(blobs.iterdir()) if blobs.exists() else set()
    assert preview(door, dataset_path="data/table.csv", columns=BY_HAND).status_code == 200
    assert (set(blobs.iterdir()) if blobs.exists() else set()) == before


def test_a_row_of_a_table_is_shown_by_hand_mapped_columns(door: TestClient) -> None:
    asked = {"dataset_path": "data/table.csv", "columns": BY_HAND}
    found = preview(door, **asked, line=3, limit=5).json()
    assert (found["format"], found["row"], found["line"]) == ("alpaca", 2, 3)
    assert "묻다 1" in found["text"]
    assert len(found["tokens"]) == 5


def test_a_packed_block_is_shown_for_pretraining(door: TestClient) -> None:
    asked = {"dataset_path": "data/text.txt", "method": "pretrain", "max_length": 16}
    found = preview(door, **asked, row=2).json()
    assert (len(found["ids"]), found["trained_tokens"]) == (16, 15)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "a row that is not there": ({"row": 99}, 422, "the file ends before it, after 8 rows"),
    "row and line": ({"row": 1, "line": 1}, 400, "exclude each other"),
    "no row": ({"row": 0}, 422, "greater than or equal to 1"),
    "a faulty row": (
        {"dataset_path": "data/bad.csv", "columns": BY_HAND, "row": 7},
        422,
        "1 cells",
    ),
    "columns that are not there": ({"columns": {"text": "x"}}, 422, "there is no column 'x'"),
    "a line of a block": ({"method": "pretrain", "line": 2}, 400, "stands in no line"),
    "chat for pretraining": ({"method": "pretrain"}, 422, "pretraining reads plain text"),
    "no such model": ({"model_name": "models/none"}, 404, "no model"),
    "no such data": ({"dataset_path": "data/none"}, 404, "no data set"),
    "another kind": ({"dataset_path": "models/tiny/model.safetensors"}, 400, "ends in none of"),
    "out of the workspace": ({"dataset_path": "/etc/passwd"}, 400, "workspace"),
    "an unknown field": ({"lines": 3}, 422, "not permitted"),
    "too many columns": ({"columns": {f"f{at}": "c" for at in range(33)}}, 422, "at most 32"),
    "a huge length": ({"max_length": 1 << 40}, 422, "less than or equal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_preview_that_cannot_be_is_told_why(door: TestClient, name: str) -> None:
    asked, status, told = REFUSED[name]
    answer = preview(door, **asked)
    assert answer.status_code == status, answer.text
    assert told in answer.text


def test_another_owners_upload_is_not_there(door: TestClient) -> None:
    body = "".join(json.dumps(row) + "\n" for row in chats(2))
    files = {"file": ("mine.jsonl", body.encode())}
    name = door.post("/upload/dataset", files=files, headers=ONE).json()["dataset_path"]
    asked = {**ASKED, "dataset_path": name}
    assert door.post("/data/preview", json=asked, headers=ONE).status_code == 200
    assert door.post("/data/preview", json=asked, headers=TWO).status_code == 404


def test_a_table_is_uploaded_under_the_names_it_is_mapped_to(door: TestClient) -> None:
    plain = upload(door, "t.csv", TABLE)
    assert plain.status_code == 422
    assert "no known format has the fields" in plain.text
    found = upload(door, "t.csv", TABLE, columns=json.dumps(BY_HAND))
    assert found.status_code == 200, found.text
    assert (found.json()["format"], found.json()["num_samples"]) == ("alpaca", 6)
    job = door.post(
        "/train/sft",
        json={**ASKED, "dataset_path": found.json()["dataset_path"], "columns": BY_HAND},
    )
    assert job.status_code == 200, job.text
    job_id = job.json()["job_id"]
    spec = hub_of(door).store.read(lambda tx: jobs.get(tx, job_id)).spec
    assert spec.columns == BY_HAND


@pytest.mark.parametrize(
    "columns", ["[]", "{", '{"a": 1}', '{"a b": "c"}', '{"a": ""}', "x" * 20_000]
)
def test_a_mapping_that_is_none_is_refused(door: TestClient, columns: str) -> None:
    assert upload(door, "t.csv", TABLE, columns=columns).status_code == 422


def test_two_mappings_of_one_file_are_checked_apart(door: TestClient) -> None:
    asked = {**ASKED, "dataset_path": "data/table.csv"}
    assert door.post("/train/sft", json=asked | {"columns": BY_HAND}).status_code == 200
    wrong = door.post("/train/sft", json=asked | {"columns": {"text": "question", "output": "no"}})
    assert wrong.status_code == 422
    assert "there is no column 'no'" in wrong.text
    assert door.post("/train/sft", json=asked).status_code == 422
    assert door.post("/train/sft", json=asked | {"columns": BY_HAND}).status_code == 200

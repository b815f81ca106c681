"""Rows that say the same, in a file or in two: told with their lines, or refused."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ASKED, hub_of, make_workspace, open_door
from train_fixtures import write_rows
from tunesmith.cli.foreground import Foreground
from tunesmith.data.alike import overlap
from tunesmith.data.rows import Row
from tunesmith.data.twins import Prints, shared
from tunesmith.errors import ValidationError
from tunesmith.spec.records import Job
from tunesmith.spec.train import Data
from tunesmith.store import events, jobs

ONCE = [{"prompt": f"{i}", "completion": "네"} for i in range(9)]
FRESH = [{"prompt": "새", "completion": "好"}]
SHARED = {"dataset_path": "data/train.jsonl", "eval_dataset_path": "data/eval.jsonl"}
SECONDS = 20.0


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    workspace = make_workspace(tmp_path)
    write_rows(workspace / "data" / "train.jsonl", ONCE)
    write_rows(workspace / "data" / "eval.jsonl", FRESH + ONCE[4:6])
    write_rows(workspace / "data" / "twice.jsonl", ONCE + ONCE[:2])
    write_rows(workspace / "data" / "fresh.jsonl", FRESH)
    return workspace


def test_what_two_files_share_is_found_whatever_their_formats(tmp_path: Path) -> None:
    training = write_rows(tmp_path / "a.jsonl", [*ONCE, {"prompt": "no completion"}])
    (tmp_path / "b.csv").write_text("completion,prompt\n네,7\n好,새\n네,0\n네,7\n")
    found = overlap(training, tmp_path / "b.csv")
    assert [(twin.line, twin.first) for twin in found.first] == [(2, 8), (4, 1), (5, 8)]
    assert overlap(training, write_rows(tmp_path / "c.jsonl", FRESH)).count == 0


def test_all_that_is_shared_is_counted_and_the_first_is_named_beyond_memory(tmp_path: Path) -> None:
    count = 200_000
    with Prints(tmp_path) as one, Prints(tmp_path) as other:
        for at in range(count):
            one.add(Row(at + 1, text=str(at)))
            other.add(Row(at + 1, text=str(count - 30 + at)))
        assert one._file is not None
        found = shared(one, other)
    assert found.count == 30
    assert [(twin.line, twin.first) for twin in found.first] == [
        (at + 1, count - 30 + at + 1) for at in range(20)
    ]
    assert list(tmp_path.iterdir()) == []


def submit(door: TestClient, **fields: Any) -> Any:
    return door.post("/train/sft", json=ASKED | fields)


def lines(answer: Any) -> list[tuple[int, str]]:
    """Those that a refusal names, with what is said of them."""
    assert answer.status_code == 422
    return [(one["loc"][-1], one["msg"].partition(";")[0]) for one in answer.json()["detail"]]


def checked(door: TestClient, **fields: Any) -> Job:
    """A job that was taken, once its check was made."""
    answer = submit(door, **fields)
    assert answer.status_code == 200, answer.text
    store, until = hub_of(door).store, time.monotonic() + SECONDS
    while time.monotonic() < until:
        job = store.read(lambda tx: jobs.get(tx, answer.json()["job_id"]))
        if job.is_validated or job.error:
            return job
        time.sleep(0.05)
    raise AssertionError("never checked")


def warned(door: TestClient, job: Job) -> list[str]:
    told = hub_of(door).store.read(partial(events.after, job_id=job.id))
    return [sentence for event in told for sentence in event.data.get("warnings", ())]


def test_rows_that_repeat_are_refused_at_the_door_where_asked_for(workspace: Path) -> None:
    twice = {"dataset_path": "data/twice.jsonl"}
    with open_door(workspace) as door:
        refused = lines(submit(door, **twice, duplicates="refuse"))
        assert refused == [(10, "says what line 1 says"), (11, "says what line 2 says")]
        assert submit(door, duplicates="maybe").status_code == 422
        checked(door, dataset_path="data/train.jsonl", duplicates="refuse")
        [sentence] = warned(door, checked(door, **twice))
        assert sentence.startswith("2 rows with the words of an earlier row (line 10 as line 1")


def test_rows_of_both_sets_are_found_by_the_check_and_known_at_the_door(workspace: Path) -> None:
    both = "2 rows of the validation set in the training set as well (line 2 as line 5"
    with open_door(workspace) as door:
        for name in ("data/train.jsonl", "data/eval.jsonl"):
            assert checked(door, dataset_path=name).error is None
        first = checked(door, **SHARED, overlap="refuse")
        assert (first.error or "").startswith(both)
        for _ in range(2):  # from the database, then from memory
            refused = lines(submit(door, **SHARED, overlap="refuse"))
            assert refused == [(2, "says what line 5 says"), (3, "says what line 6 says")]
        [sentence] = warned(door, checked(door, **SHARED))
        assert sentence.startswith(both)
        fresh = SHARED | {"eval_dataset_path": "data/fresh.jsonl"}
        job = checked(door, **fresh, overlap="refuse")
        assert (job.error, warned(door, job)) == (None, [])


def test_a_training_without_a_server_refuses_them_too(workspace: Path) -> None:
    for asked, lines in (
        ("overlap: refuse", "line 2 as line 5"),
        ("duplicates: refuse", "line 10 as line 1"),
    ):
        name = "train" if "overlap" in asked else "twice"
        spec = workspace / "spec.yaml"
        spec.write_text(
            f"method: sft\nmodel: {workspace}/models/tiny\n{asked}\n"
            f"dataset: {workspace}/data/{name}.jsonl\neval_dataset: {workspace}/data/eval.jsonl\n"
        )
        with pytest.raises(ValidationError, match=lines):
            Foreground.prepare(spec, workspace / "out")


def test_what_is_not_said_is_told_and_not_refused() -> None:
    assert (Data().duplicates, Data().overlap) == ("warn", "warn")

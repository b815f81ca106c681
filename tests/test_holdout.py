"""A share of the rows is kept back from training: the same one always, and never trained on."""

from pathlib import Path

import pytest

from api_fixtures import ASKED, make_workspace, open_door
from train_fixtures import Place, make_model, pairs, preferences, run_here, sft, tuned, write_rows
from tunesmith.data.holdout import hold_out
from tunesmith.data.rows import RowIndex
from tunesmith.errors import JobFailure, ValidationError
from tunesmith.spec.train import Lora, Preference, Pretrain, Sft


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("holdout") / "model")


def index_of(folder: Path, rows: list[dict[str, str]]) -> RowIndex:
    return RowIndex.open(write_rows(folder / "rows.jsonl", rows))


def test_every_row_falls_to_one_side_by_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": "네"} for i in range(1000)]
    index = index_of(tmp_path, rows)
    rest, held = hold_out(index, 0.05, seed=7)
    assert len(held) == 50
    assert sorted([*rest.places, *held.places]) == list(range(1000))
    assert list(rest.places) == sorted(rest.places)
    assert hold_out(index, 0.05, seed=7)[1].places == held.places
    assert hold_out(index, 0.05, seed=8)[1].places != held.places
    assert [held[i].line - 1 for i in range(50)] == list(held.places)


def test_rows_that_read_alike_fall_to_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 20}", "completion": "好"} for i in range(100)]
    rest, held = hold_out(index_of(tmp_path, rows), 0.1, seed=1)
    said = {held[i].prompt for i in range(len(held))}
    assert said.isdisjoint({rest[i].prompt for i in range(len(rest))})
    assert len(held) == 5 * len(said) >= 10


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_at_least_one_is_held_out_and_one_is_left(tmp_path: Path, share: float) -> None:
    rest, held = hold_out(index_of(tmp_path, pairs(2)), share, seed=1)
    assert (len(rest), len(held)) == (1, 1)


@pytest.mark.parametrize("rows", [pairs(1), pairs(1) * 9])
def test_none_left_is_refused(tmp_path: Path, model: Path, rows: list[dict[str, str]]) -> None:
    with pytest.raises(ValidationError, match="none is left to train on"):
        hold_out(index_of(tmp_path, rows), 0.5, seed=1)
    place = Place(tmp_path, model, tmp_path / "rows.jsonl")
    with pytest.raises(JobFailure, match="none is left to train on"):
        run_here(place.task(sft(holdout=0.5)))


def test_what_is_held_out_is_evaluated_and_not_trained_on(model: Path, tmp_path: Path) -> None:
    rows = pairs(40)
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows))
    events = run_here(place.task(sft(holdout=0.25, epochs=2)))
    started = events.of("started")[0]["detail"]
    assert (started["rows"], started["eval_rows"]) == (30, 10)
    assert events.last["detail"]["samples"] == 60
    assert events.of("evaluated")[-1]["metrics"]["eval_loss"] > 0

    with RowIndex.open(place.dataset) as index:
        parts = hold_out(index, 0.25, seed=42)
        names = []
        for name, part in zip(("a", "b"), parts, strict=True):
            names.append(write_rows(tmp_path / f"{name}.jsonl", [rows[at] for at in part.places]))
    apart = Place(tmp_path / "apart", model, names[0])
    apart.folder.mkdir()
    inputs = {"model": str(model), "dataset": str(names[0]), "eval_dataset": str(names[1])}
    told = run_here(apart.task(sft(epochs=2), inputs=inputs))
    assert told.losses == events.losses
    assert told.of("evaluated") == events.of("evaluated")


@pytest.mark.parametrize("kind", ["dpo", "pretrain"])
def test_other_methods_hold_out_too(model: Path, tmp_path: Path, kind: str) -> None:
    spec = tuned(Preference, holdout=0.2, lora=Lora(rank=2))
    rows: list[dict[str, str]] = preferences(20)
    if kind == "pretrain":
        rows = [{"text": f"고양이 {i} {'meow ' * (i % 7 + 5)}"} for i in range(20)]
        spec = Pretrain(model="m", dataset="d", sequence_length=32, holdout=0.2, from_scratch=False)
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows))
    events = run_here(place.task(spec))
    assert events.of("started")[0]["detail"]["eval_rows"] == 4
    assert events.of("evaluated")[-1]["metrics"]["eval_loss"] > 0


def test_two_ways_of_evaluating_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Sft(model="m", dataset="d", eval_dataset="e", holdout=0.1)
    workspace = make_workspace(tmp_path)
    write_rows(workspace / "data" / "one.jsonl", pairs(1))
    with open_door(workspace) as door:
        both = ASKED | {"holdout": 0.1, "eval_dataset_path": "data/chat.jsonl"}
        assert door.post("/train/sft", json=both).status_code == 400
        one = ASKED | {"holdout": 0.1, "dataset_path": "data/one.jsonl"}
        answer = door.post("/train/sft", json=one)
        assert answer.status_code == 422
        assert "has one row" in answer.text
        assert door.post("/train/sft", json=ASKED | {"holdout": 0.6}).status_code == 422

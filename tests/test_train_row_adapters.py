"""Rows that name the adapter they are to train: one for each, side by side over one base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from test_train_sweep import losses_of, same, weights_of
from train_fixtures import Place, make_model, pairs, run_here, sft, write_rows
from tunesmith.data.reading import Reading
from tunesmith.data.rows import check_file
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.sweep import SweepTable
from tunesmith.spec.train import Lora, Sft

KINDS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["v_proj", "q_proj"], "rank": 2},
    {"target_modules": "q_proj, v_proj", "rank": 2},
    {"target_modules": ["down_proj"]},
    {"target_modules": "all-linear", "rank": 4},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rows")
    model = make_model(folder / "model")
    rows = [{**row, **KINDS[place % 5]} for place, row in enumerate(pairs(40))]
    return Place(folder, model, write_rows(folder / "rows.jsonl", rows))


def spec_of(**over: Any) -> Sft:
    return sft(Lora(rank=4, dropout=0.2), max_steps=4, **over)


def alone(place: Place, rows: list[dict[str, Any]], lora: Lora) -> Any:
    dataset = write_rows(place.folder / "part.jsonl", rows)
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    return run_here(place.task(sft(lora, max_steps=4), inputs=inputs))


def test_each_pair_trains_an_adapter_of_its_own_on_its_own_rows(place: Place) -> None:
    events = run_here(place.task(spec_of()))
    artifact = Path(events.last["artifact"])
    table = SweepTable.model_validate_json((artifact / "sweep.json").read_bytes())
    assert [(one.name, one.rows) for one in table.trials] == [
        ("configured", 16),
        ("adapter-1", 16),
        ("adapter-2", 8),
    ]
    assert table.trials[1].settings == {"rank": 2, "targets": ["q_proj", "v_proj"]}
    rows = pairs(40)
    parts = {
        "configured": ([0, 4], Lora(rank=4, dropout=0.2)),
        "adapter-1": ([1, 2], Lora(rank=2, dropout=0.2, targets=("q_proj", "v_proj"))),
        "adapter-2": ([3], Lora(rank=4, dropout=0.2, targets=("down_proj",))),
    }
    for name, (kinds, lora) in parts.items():
        own = [row for at, row in enumerate(rows) if at % 5 in kinds]
        by_itself = alone(place, own, lora)
        assert losses_of(events, name) == by_itself.losses
        assert same(weights_of(events, f"adapters/{name}"), weights_of(by_itself))


def test_rows_go_on_from_a_checkpoint_as_a_sweep_does(place: Place) -> None:
    spec = spec_of(run={"save_steps": 2, "save_seconds": 3600, "keep_checkpoints": 9})
    whole = run_here(place.task(spec))
    path = whole.of("checkpointed")[0]["path"]
    again = run_here(place.task(spec, resume_from=path))
    for name in ("configured", "adapter-1", "adapter-2"):
        assert same(weights_of(again, f"adapters/{name}"), weights_of(whole, f"adapters/{name}"))


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"target_modules": ["q_proj"], "rank": 0}, "rank"),
        ({"target_modules": ["q_proj"], "rank": 1025}, "rank"),
        ({"target_modules": ["q_proj"], "rank": 2.5}, "rank"),
        ({"target_modules": [], "rank": 2}, "target_modules"),
        ({"target_modules": [7]}, "target_modules"),
        ({"target_modules": ["../x"]}, "target_modules"),
    ],
)
def test_what_no_adapter_can_be_is_a_fault_of_its_line(
    named: dict[str, Any], told: str, tmp_path: Path
) -> None:
    rows = [*pairs(2), {**pairs(1)[0], **named}]
    report = check_file(write_rows(tmp_path / "rows.jsonl", rows))
    [fault] = report.faults
    assert (fault.line, fault.loc) == (3, told)
    assert not report.ignored_fields


def test_a_module_that_the_model_has_not_is_refused_with_its_line(
    place: Place, tmp_path: Path
) -> None:
    rows = [*pairs(2), {**pairs(1)[0], "target_modules": ["q_proj", "c_attn"]}]
    inputs = Inputs(model=str(place.model), dataset=str(write_rows(tmp_path / "r.jsonl", rows)))
    with pytest.raises(JobFailure, match=r"line 3.*'c_attn'.*q_proj") as caught:
        run_here(place.task(spec_of(), inputs=inputs))
    assert caught.value.failure_class is FailureClass.DATA_ERROR


def test_a_rank_alone_counts_only_where_that_is_asked_for(place: Place, tmp_path: Path) -> None:
    rows = [{**row, "rank": 2 + 2 * (at % 2)} for at, row in enumerate(pairs(12))]
    inputs = Inputs(model=str(place.model), dataset=str(write_rows(tmp_path / "r.jsonl", rows)))
    plain = run_here(place.task(spec_of(), inputs=inputs))
    assert not list(Path(plain.last["artifact"]).glob("adapters/*"))
    ranked = run_here(place.task(spec_of(row_ranks=True), inputs=inputs))
    names = sorted(path.name for path in Path(ranked.last["artifact"]).glob("adapters/*"))
    assert names == ["adapter-1", "configured"]
    assert Reading.of(spec_of()).key == ""
    assert Reading.of(spec_of(row_ranks=True)).key


def test_rows_with_adapters_go_with_no_sweep(place: Place) -> None:
    with pytest.raises(JobFailure, match="goes with no sweep"):
        run_here(place.task(spec_of(sweep={"grid": {"rank": [2, 4]}})))

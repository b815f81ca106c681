"""Several configurations as one job: each is what it would be alone, and one is the best."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train_fixtures import (
    Events,
    Place,
    make_model,
    pairs,
    preferences,
    run_here,
    sft,
    tuned,
    write_rows,
)
from tunesmith import manifest
from tunesmith.errors import JobFailure
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.sweep import SweepTable
from tunesmith.spec.train import Kto, Lora, Preference, Run, Sweepable

TRIALS = (
    {"name": "quick", "learning_rate": 5e-3, "rank": 2},
    {"dropout": 0.4, "seed": 9, "batch_size": 3},
    {"use_dora": True, "dropout": 0.2, "epochs": 0.6, "scheduler": "linear", "warmup_steps": 2},
    {"use_rslora": True, "rank": 8, "targets": ["q_proj", "down_proj"], "max_steps": 4},
)
NAMES = ["quick", "trial-2", "trial-3", "trial-4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sweep")
    model = make_model(folder / "model")
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(40)))


def spec_of(**over: Any) -> Sweepable:
    given = {"epochs": 1.0, "eval_dataset": "e", "sweep": {"trials": TRIALS}, **over}
    return sft(Lora(rank=4), **given)


def inputs_of(place: Place) -> Inputs:
    held_out = write_rows(place.folder / "eval.jsonl", pairs(9, 5))
    return Inputs(model=str(place.model), dataset=str(place.dataset), eval_dataset=str(held_out))


def losses_of(events: Events, name: str) -> dict[int, float]:
    return {one["trial_step"]: one["loss"] for one in events.of("step") if one["trial"] == name}


def weights_of(events: Events, part: str = "") -> dict[str, torch.Tensor]:
    return load_file(Path(events.last["artifact"]) / part / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def swept(place: Place) -> Events:
    return run_here(place.task(spec_of(), inputs=inputs_of(place)))


def test_each_configuration_learns_as_it_would_alone(place: Place, swept: Events) -> None:
    for name, spec in spec_of().configurations().items():
        alone = run_here(place.task(spec, inputs=inputs_of(place)))
        assert losses_of(swept, name) == alone.losses
        assert same(weights_of(swept, f"adapters/{name}"), weights_of(alone))
        evaluated = [one["metrics"] for one in swept.of("evaluated") if one["trial"] == name]
        assert evaluated == [one["metrics"] for one in alone.of("evaluated")]


def test_steps_are_counted_over_all_configurations(swept: Events) -> None:
    steps = swept.of("step")
    assert [one["step"] for one in steps] == list(range(1, len(steps) + 1))
    assert {one["total_steps"] for one in steps} == {len(steps)}
    assert [one["trial"] for one in steps[:5]] == [*NAMES, "quick"]
    [started] = swept.of("started")
    assert started["total_steps"] == len(steps)
    assert started["detail"]["trials"] == NAMES


def test_the_result_is_a_table_and_the_best_stands_at_the_root(swept: Events) -> None:
    artifact = Path(swept.last["artifact"])
    manifest.verify(artifact)
    table = SweepTable.model_validate_json((artifact / "sweep.json").read_bytes())
    assert [one.name for one in table.trials] == NAMES
    assert table.by == "eval_loss"
    assert table.best == min(table.trials, key=lambda one: one.eval_loss or 99).name
    assert [one.settings for one in table.trials][1] == TRIALS[1]
    [told] = [one for one in swept.of("notice") if one["code"] == "sweep"]
    assert SweepTable.model_validate(told["detail"]) == table
    assert same(weights_of(swept), weights_of(swept, f"adapters/{table.best}"))
    record = json.loads((artifact / "training.json").read_bytes())
    assert record["sweep"]["best"] == table.best
    own = json.loads((artifact / "adapters" / "trial-3" / "training.json").read_bytes())
    assert own["spec"]["lora"]["use_dora"]


def test_each_adapter_loads_in_plain_peft(place: Place, swept: Events) -> None:
    base = AutoModelForCausalLM.from_pretrained(place.model)
    artifact = Path(swept.last["artifact"])
    peft = PeftModel.from_pretrained(base, artifact / "adapters" / "quick", "quick").eval()
    ids, logits = torch.arange(3, 20)[None], {}
    for name in NAMES:
        if name != "quick":
            peft.load_adapter(artifact / "adapters" / name, name)
        peft.set_adapter(name)
        logits[name] = peft(ids).logits
        assert (artifact / "adapters" / name / "tokenizer.json").is_file()
    assert not torch.equal(logits["quick"], logits["trial-2"])


def test_a_sweep_goes_on_from_any_step_bit_for_bit(place: Place, swept: Events) -> None:
    spec = spec_of(run=Run(save_seconds=3600, compare_rows=0))
    for stop_at in (3, 14, 31):
        first = run_here(place.task(spec, inputs=inputs_of(place)), stopping(stop_at))
        assert first.last["type"] == "stopped"
        saved = first.of("checkpointed")[-1]
        assert saved["step"] == first.last["step"] > 0
        again = run_here(place.task(spec, inputs=inputs_of(place), resume_from=saved["path"]))
        for name in NAMES:
            assert losses_of(first, name) | losses_of(again, name) == losses_of(swept, name)
            assert same(
                weights_of(again, f"adapters/{name}"), weights_of(swept, f"adapters/{name}")
            )


def stopping(after: int) -> Any:
    """Asks that want a stop once they were looked at so often: at each step, and in evaluations."""

    class Counting:
        looks = 0
        should_checkpoint = False

        @property
        def should_stop(self) -> bool:
            self.looks += 1
            return self.looks > after

    return Counting()


def test_one_that_goes_astray_takes_no_other_along(place: Place) -> None:
    wild = {"name": "wild", "learning_rate": 10, "weight_decay": 10, "scheduler": "constant"}
    trials = (wild, {"name": "tame"})
    spec = spec_of(sweep={"trials": trials}, eval_dataset=None, epochs=4.0)
    events = run_here(place.task(spec))
    table = SweepTable.model_validate_json(
        (Path(events.last["artifact"]) / "sweep.json").read_bytes()
    )
    assert [one.status for one in table.trials] == ["failed", "succeeded"]
    assert "no finite number" in (table.trials[0].error or "")
    assert (table.best, table.by) == ("tame", "loss")
    assert not (Path(events.last["artifact"]) / "adapters" / "wild").exists()
    alone = run_here(place.task(spec.configurations()["tame"]))
    assert losses_of(events, "tame") == alone.losses
    assert any(one["code"] == "trial_failed" for one in events.of("notice"))
    with pytest.raises(JobFailure, match="no configuration is left"):
        run_here(place.task(spec_of(sweep={"trials": trials[:1]}, epochs=4.0)))


@pytest.mark.parametrize("kind", [Preference, Kto])
def test_preferences_are_swept_too(kind: type[Sweepable], place: Place, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "pairs.jsonl", preferences(14))
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    grid = {"learning_rate": [1e-3, 5e-3], "rank": [2]}
    run = Run(save_steps=2, save_seconds=3600, keep_checkpoints=100)
    spec = tuned(kind, lora=Lora(rank=4), sweep={"grid": grid}, run=run)
    swept = run_here(place.task(spec, inputs=inputs))
    for name, one in spec.configurations().items():
        alone = run_here(place.task(one, inputs=inputs))
        assert losses_of(swept, name) == alone.losses
        assert same(weights_of(swept, f"adapters/{name}"), weights_of(alone))
    path = swept.of("checkpointed")[0]["path"]
    again = run_here(place.task(spec, inputs=inputs, resume_from=path))
    assert same(weights_of(again), weights_of(swept))


def test_a_checkpoint_of_one_training_is_none_of_several(place: Place, swept: Events) -> None:
    path = swept.of("checkpointed")[-1]["path"]
    with pytest.raises(JobFailure, match="several configurations"):
        run_here(place.task(sft(Lora(rank=4)), resume_from=path))

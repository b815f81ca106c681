"""What evaluations are for: when to stop, which weights stay, and whether it was worth while."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from train_fixtures import Place, make_model, pairs, preferences, run_here, sft, tuned, write_rows
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.errors import JobFailure
from tunesmith.spec.pipe import Inputs, TrainerTask
from tunesmith.spec.train import Best, Kto, Lora, Preference, Run, Sft
from tunesmith.train.comparison import compare

ROWS = pairs(24)
LATER = [{"prompt": row["prompt"], "completion": row["prompt"][::-1]} for row in pairs(8, 30)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("evaluation")
    dataset = write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "later.jsonl", LATER)
    return Place(folder, make_model(folder / "model"), dataset)


def task(place: Place, best: Best | None = None, **over: Any) -> TrainerTask:
    """Held-out rows that get worse once the others are learnt by heart."""
    over = {"learning_rate": 2e-2, "epochs": 6.0, **over}
    run = Run(best=best, save_seconds=3600, save_steps=over.pop("save_steps", None))
    spec = sft(over.pop("lora", None), run=run, eval_dataset="e", **over)
    later = str(place.folder / "later.jsonl")
    inputs = Inputs(model=str(place.model), dataset=str(place.dataset), eval_dataset=later)
    return place.task(spec, inputs=inputs)


def weights(artifact: str) -> dict[str, torch.Tensor]:
    [path] = Path(artifact).glob("*.safetensors")
    return load_file(path)


def eval_losses(events: Any) -> dict[int, float]:
    told = [event for event in events.of("evaluated") if "eval_loss" in event["metrics"]]
    return {event["step"]: event["metrics"]["eval_loss"] for event in told}


@pytest.mark.parametrize(
    ("lora", "wanted"),
    [(None, Best()), (Lora(rank=4), Best(greater_is_better=True))],
    ids=["full, the lowest", "lora, the highest"],
)
def test_the_result_has_the_weights_of_the_best_evaluation(
    place: Place, lora: Lora | None, wanted: Best
) -> None:
    """All weights learn the rows by heart, and do worse on others; so few of them do better."""
    events = run_here(task(place, wanted, lora=lora))
    told = eval_losses(events)
    choose = max if wanted.is_greater_better else min
    best = choose(told, key=lambda step: told[step])
    assert best < max(told), "the best is not to be the last"
    assert f"step {best}" in next(
        one["message"] for one in events.of("notice") if one["code"] == "best_kept"
    )
    short = sft(
        lora,
        run=Run(save_seconds=3600, save_steps=best, keep_checkpoints=50),
        eval_dataset="e",
        learning_rate=2e-2,
        epochs=6.0,
    )
    plain = run_here(place.task(short, inputs=task(place).inputs))
    [then] = [one for one in plain.of("checkpointed") if one["step"] == best]
    kept, known = weights(events.last["artifact"]), weights(then["path"] + "/model")
    assert all(torch.equal(kept[name], known[name]) for name in known)
    assert events.losses == plain.losses


def test_training_ends_once_patience_is_out(place: Place) -> None:
    events = run_here(task(place, Best(patience=2, keep=False)))
    told = eval_losses(events)
    best = min(told, key=lambda step: told[step])
    assert max(told) == best + 12
    assert events.last["step"] == max(told) < 36
    assert any(one["code"] == "stopped_early" for one in events.of("notice"))


def test_a_resumed_job_stops_at_the_same_step_with_the_same_weights(place: Place) -> None:
    best = Best(patience=2, min_delta=1e-3)
    whole = run_here(task(place, best))
    given = task(place, best, save_steps=5)
    first = run_here(given)
    checkpoints = [one["path"] for one in first.of("checkpointed")]
    resumed = run_here(given.model_copy(update={"resume_from": checkpoints[-2]}))
    assert resumed.last["step"] == whole.last["step"]
    assert eval_losses(resumed).items() <= eval_losses(whole).items()
    kept, known = weights(resumed.last["artifact"]), weights(whole.last["artifact"])
    assert all(torch.equal(kept[name], known[name]) for name in known)
    assert resumed.last["detail"]["base_loss"] == whole.last["detail"]["base_loss"]
    assert resumed.last["detail"]["tuned_loss"] == whole.last["detail"]["tuned_loss"]


def test_a_metric_that_is_not_there_is_named(place: Place) -> None:
    with pytest.raises(JobFailure, match="no 'eval_bleu'"):
        run_here(task(place, Best(metric="eval_bleu")))


def test_best_wants_rows_to_judge_by() -> None:
    with pytest.raises(ValueError, match="needs held-out rows"):
        Sft(model="m", dataset="d", run=Run(best=Best()))


def test_token_accuracy_is_that_of_plain_transformers(place: Place) -> None:
    events = run_here(task(place, epochs=1.0))
    metrics = events.of("evaluated")[0]["metrics"]
    model = AutoModelForCausalLM.from_pretrained(events.last["artifact"]).requires_grad_(False)
    renderer, hits, labels, loss = Renderer.load(place.model), 0, 0, 0.0
    with RowIndex.open(place.folder / "later.jsonl") as index:
        for row in index:
            encoded = renderer.encode(row)
            ids = torch.tensor([encoded.ids])
            logits = model(ids).logits[0, :-1]
            mask = torch.tensor(encoded.mask[1:])
            hits += int(((logits.argmax(-1) == ids[0, 1:]) & mask).sum())
            labels += int(mask.sum())
            loss += float(cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum"))
    assert metrics["eval_token_accuracy"] == pytest.approx(hits / labels)
    assert metrics["eval_loss"] == pytest.approx(loss / labels, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_base_and_tuned_are_compared_by_default(place: Place, tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = pairs(40) if kind == "sft" else preferences(40)
    kinds = {"dpo": Preference, "kto": Kto}
    optim = {"learning_rate": 2e-2, "epochs": 3.0, "holdout": 0.3}
    spec = sft(**optim) if kind == "sft" else tuned(kinds[kind], **optim)
    own = Place(tmp_path, place.model, write_rows(tmp_path / "rows.jsonl", rows))
    events = run_here(own.task(spec))
    detail = events.last["detail"]
    if kind == "kto":
        assert "base_loss" not in detail
        return
    if kind == "dpo":
        assert detail["base_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert detail["loss_change"] == pytest.approx(detail["tuned_loss"] - detail["base_loss"])
    assert detail["loss_change_low"] <= detail["loss_change"] <= detail["loss_change_high"]
    assert kind == "dpo" or detail["loss_change_high"] < 0
    record = json.loads((Path(events.last["artifact"]) / "training.json").read_bytes())
    assert record["metrics"]["base_loss"] == detail["base_loss"]
    assert any("base against tuned" in one["message"] for one in events.of("notice"))
    off = spec.model_copy(update={"run": Run(compare_rows=0)})
    plain = run_here(own.task(off))
    assert "base_loss" not in plain.last["detail"]
    assert plain.losses == events.losses


def test_the_interval_covers_what_is_true() -> None:
    dice = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        before = torch.randn(60, generator=dice)
        after = before - 0.3 + torch.randn(60, generator=dice)
        found = compare(before.tolist(), after.tolist(), seed)
        assert found is not None
        covered += found.low <= -0.3 <= found.high
    assert 180 <= covered <= 198
    assert compare([1.0, math.nan], [1.0, 1.0], 0) is None
    assert compare([], [], 0) is None

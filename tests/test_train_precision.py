"""Half precision: what it computes, and the scale of the loss that fp16 needs."""

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from train_fixtures import PLAN, Place, make_model, pairs, run_here, sft, write_rows
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.train import Lora, Run
from tunesmith.train.scaling import DOUBLED_AFTER, FIRST, LossScale

EACH_STEP = Run(save_steps=1, keep_checkpoints=9, save_seconds=3600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("precision")
    model = make_model(folder / "model")
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(24)))


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_full_precision_does(
    place: Place, precision: str, lora: Lora | None
) -> None:
    half = PLAN.model_copy(update={"precision": precision})
    spec = sft(lora, max_steps=5, learning_rate=1e-2)
    whole, halved = (run_here(place.task(spec, plan=plan)) for plan in (PLAN, half))
    assert halved.losses != whole.losses
    assert halved.losses == pytest.approx(whole.losses, rel=1e-2)
    if lora is None:  # with adapters PEFT draws others than the lean forward
        norms = [[event["grad_norm"] for event in one.of("step")] for one in (halved, whole)]
        assert norms[0] == pytest.approx(norms[1], rel=5e-2)


def test_fp16_goes_on_from_a_checkpoint_to_the_same_bits(place: Place) -> None:
    half = PLAN.model_copy(update={"precision": "fp16"})
    whole = run_here(place.task(sft(max_steps=5, run=EACH_STEP), plan=half))
    scales = [event["metrics"]["loss_scale"] for event in whole.of("step")]
    second = whole.of("checkpointed")[1]["path"]
    rest = run_here(place.task(sft(max_steps=5, run=EACH_STEP), resume_from=second, plan=None))
    assert rest.losses == {step: whole.losses[step] for step in (3, 4, 5)}
    assert [event["metrics"]["loss_scale"] for event in rest.of("step")] == scales[2:]


def test_an_overflow_halves_the_scale_and_loses_no_row(place: Place, tmp_path: Path) -> None:
    loud = make_model(tmp_path / "loud")
    weights = load_file(loud / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 100
    save_file(weights, loud / "model.safetensors", {"format": "pt"})
    half = PLAN.model_copy(update={"precision": "fp16"})
    inputs = Inputs(model=str(loud), dataset=str(place.dataset))
    high = run_here(place.task(sft(batch_size=1, max_steps=3), plan=half, inputs=inputs))
    steps = high.of("step")
    assert all(math.isfinite(event["grad_norm"]) for event in steps)
    assert steps[-1]["metrics"]["loss_scale"] < FIRST
    assert high.last["detail"]["skipped_updates"] == 0


def test_the_scale_grows_after_many_updates_and_ends_at_one() -> None:
    scale = LossScale.of("fp16")
    assert scale.lower()
    for _ in range(DOUBLED_AFTER):
        scale.count()
    assert scale == LossScale(FIRST)
    while scale.lower():
        continue
    assert scale.value == 1
    assert not LossScale.of("bf16").lower()

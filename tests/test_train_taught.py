"""A reward model trained first, then the policy that it rewards: one job."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train_fixtures import Place, make_model, preferences, run_here, tuned, write_rows
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.language import open_scorer
from tunesmith.nn.opening import Opening
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.train import Grpo, Lora, Ppo, Reward, Run, reward_training
from tunesmith.train.process import Asks

EACH_STEP = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
SHORT = {"max_completion_length": 6, "max_length": 64, "rollout_batch_size": 8, "batch_size": 16}
FIRST = {"rewards": [{"kind": "trained", "learning_rate": 1e-2}], "max_steps": 3, "run": EACH_STEP}
PUBLISHED = "/house/models/tiny"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("taught")
    rows = preferences(16)
    return Place(folder, make_model(folder / "model"), write_rows(folder / "pairs.jsonl", rows))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def named(place: Place) -> Inputs:
    """As on a host of its own: the model has another path there."""
    inputs = Inputs(model=str(place.model), dataset=str(place.dataset))
    return inputs.model_copy(update={"named": {str(place.model): PUBLISHED}})


@pytest.mark.parametrize(("kind", "lora"), [(Grpo, Lora(rank=4)), (Ppo, None)])
def test_both_parts_go_on_from_any_step_to_the_same_bits(place, kind, lora):
    spec = tuned(kind, **SHORT, **FIRST, lora=lora)
    inputs = named(place)
    whole = run_here(place.task(spec, inputs=inputs))
    saved = {event["step"]: event["path"] for event in whole.of("checkpointed")}
    assert list(saved) == list(range(1, 8))
    made = Path(whole.last["artifact"])
    for step in (2, 4, 5):
        again = run_here(place.task(spec, inputs=inputs, resume_from=saved[step]))
        assert again.losses == {at: loss for at, loss in whole.losses.items() if at > step}
        for part in ("", "reward_model"):
            expected, found = (
                weights_of(made / part),
                weights_of(Path(again.last["artifact"]) / part),
            )
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    if lora is not None:
        for folder in (made, Path(saved[6]) / "model"):
            config = json.loads((folder / "reward_model" / "adapter_config.json").read_bytes())
            assert config["base_model_name_or_path"] == PUBLISHED


def test_the_steps_of_both_are_counted_through_and_told_apart(place):
    events = run_here(place.task(tuned(Grpo, **SHORT, **FIRST)))
    steps = events.of("step")
    assert [event["trial"] for event in steps] == ["reward_model"] * 4 + [None] * 3
    assert [event["step"] for event in steps] == list(range(1, 8))
    assert [event["total_steps"] for event in steps] == [7] * 7
    assert "accuracy" in steps[0]["metrics"]
    assert "reward/trained" in steps[-1]["metrics"]
    assert events.last["step"] == 7


def test_the_reward_model_is_the_one_that_method_reward_makes(place):
    spec = tuned(Grpo, **SHORT, **FIRST)
    first = reward_training(spec)
    assert isinstance(first, Reward)
    alone = Path(run_here(place.task(first)).last["artifact"])
    made = Path(run_here(place.task(spec)).last["artifact"]) / "reward_model"
    expected, found = weights_of(alone), weights_of(made)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((made / "training.json").read_bytes())["spec"]["method"] == "reward"
    open_scorer(str(made), Opening(lora=None))


def test_a_stop_in_the_first_part_is_heeded(place):
    asks = Asks()
    asks.should_stop = True
    events = run_here(place.task(tuned(Grpo, **SHORT, **FIRST)), asks)
    assert events.last == {"type": "stopped", "step": 0}


def test_rows_that_compare_nothing_are_refused_where_no_reward_is_named(place):
    rows = write_rows(place.folder / "asked.jsonl", [{"prompt": "river"}])
    inputs = Inputs(model=str(place.model), dataset=str(rows))
    spec = tuned(Grpo, **SHORT)
    with pytest.raises(JobFailure, match="no reward model can be trained first") as caught:
        run_here(place.task(spec, inputs=inputs))
    assert caught.value.failure_class is FailureClass.DATA_ERROR


def test_a_checkpoint_of_a_job_with_other_rewards_is_refused(place):
    rows = write_rows(place.folder / "plain.jsonl", preferences(8))
    inputs = Inputs(model=str(place.model), dataset=str(rows))
    other = tuned(Grpo, **SHORT, **(FIRST | {"rewards": [{"kind": "exact_match"}]}))
    saved = run_here(place.task(other, inputs=inputs)).of("checkpointed")[0]["path"]
    with pytest.raises(JobFailure, match="trained no reward model first"):
        run_here(place.task(tuned(Grpo, **SHORT, **FIRST), resume_from=saved))


def test_smaller_passes_of_the_first_part_hold_in_the_second(place, monkeypatch):
    """As they do for an attempt that goes on from there."""
    backward, times = torch.Tensor.backward, iter(range(1000))

    def short(self, *given, **named):
        if next(times) == 1:
            raise torch.OutOfMemoryError("no memory for the second step")
        return backward(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "backward", short)
    whole = run_here(place.task(tuned(Grpo, **SHORT, **FIRST)))
    [found] = [event["plan"] for event in whole.of("replanned")]
    before, after = [event["plan"] for event in whole.of("started")]
    assert after == found != before
    saved = whole.of("checkpointed")[2]["path"]
    again = run_here(place.task(tuned(Grpo, **SHORT, **FIRST), resume_from=saved, plan=None))
    assert again.losses == {at: loss for at, loss in whole.losses.items() if at > 3}

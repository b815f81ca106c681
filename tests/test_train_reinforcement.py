"""Reinforcement: rounds, what is told of them, and going on from the middle of one."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl_fixtures import ANSWERS, ASKED, MATCH, guessing, inputs_of
from train_fixtures import PLAN, run_here, tuned
from tunesmith.data.render import Renderer
from tunesmith.data.row import Row
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.chat import Message
from tunesmith.spec.train import Grpo, Lora, Ppo, Rloo, Run
from tunesmith.train.alarms import Alarms
from tunesmith.train.process import Asks
from tunesmith.train.prompts import prompt_ids

EACH_STEP = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
SHORT = {"rewards": MATCH, "max_completion_length": 6, "max_length": 32, "rollout_batch_size": 4}
ROUNDS = SHORT | {"update_epochs": 2, "batch_size": 16, "max_steps": 10, "kl_target": 0.05}
TOLD = {
    "clipped_share",
    "reward/mean",
    "reward/std",
    "reward/exact_match",
    "kl_divergence",
    "kl_coefficient",
    "episode_length",
    "entropy",
    "truncated",
    "even_groups",
    "clip_fraction",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return guessing(tmp_path_factory.mktemp("reinforcement"))


def weights_of(events):
    (path,) = Path(events.last["artifact"]).glob("*.safetensors")
    return load_file(path)


def metrics_of(events):
    return {event["step"]: event["metrics"] for event in events.of("step")}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        (Grpo, None),
        (Grpo, Lora(rank=4)),
        (Rloo, Lora(rank=4)),
        (Ppo, None),
        (Ppo, Lora(rank=4)),
    ],
)
def test_a_run_goes_on_from_any_step_to_the_same_bits(place, kind, lora):
    size = {} if kind is Ppo else {"num_generations": 8}
    size |= {"rollout_batch_size": 32} if kind is Ppo else {}
    spec = tuned(kind, **(ROUNDS | size), lora=lora, run=EACH_STEP)
    whole = run_here(place.task(spec))
    saved = {event["step"]: event["path"] for event in whole.of("checkpointed")}
    for step in (4, random.randrange(1, 10)):
        again = run_here(place.task(spec, resume_from=saved[step]))
        assert again.losses.items() <= whole.losses.items()
        assert metrics_of(again).items() <= metrics_of(whole).items()
        expected, found = weights_of(whole), weights_of(again)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_round_is_drawn_once_for_all_its_updates(place):
    events = run_here(place.task(tuned(Grpo, **ROUNDS)))
    steps = events.of("step")
    assert all(set(step["metrics"]) == TOLD for step in steps)
    means = [step["metrics"]["entropy"] for step in steps]
    assert [len(set(means[at : at + 4])) for at in (0, 4, 8)] == [1, 1, 1]
    assert len(set(means)) == 3
    first = steps[0]["metrics"]
    assert first["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert first["clip_fraction"] == 0
    assert 1 < first["episode_length"] <= 6
    assert events.of("started")[0]["total_steps"] == 10


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_passes_do_not_change_the_updates(place, loss):
    spec = tuned(Grpo, **(ROUNDS | {"max_steps": 4}), loss=loss)
    one = run_here(place.task(spec))
    many = run_here(place.task(spec, plan=PLAN.model_copy(update={"micro_batch_tokens": 20})))
    assert many.losses == pytest.approx(one.losses, abs=1e-6)
    expected = weights_of(one)
    for name, found in weights_of(many).items():
        assert found == pytest.approx(expected[name], abs=1e-5)


def test_beta_follows_the_divergence(place):
    events = run_here(place.task(tuned(Rloo, **ROUNDS | {"num_generations": 4, "max_steps": 6})))
    told = [step["metrics"] for step in events.of("step")]
    first, second = told[0], told[2]
    assert first["kl_coefficient"] == 0.05
    assert second["kl_coefficient"] == pytest.approx(0.05 * (1 - 0.1 * 0.2))


def test_held_out_prompts_are_answered_with_what_is_likeliest(place):
    rows = [{"prompt": word, "reference": ANSWERS[0].strip()} for word in ASKED]
    inputs = inputs_of(place, rows, "held-out.jsonl")
    both = inputs.model_copy(update={"eval_dataset": inputs.dataset})
    spec = tuned(Grpo, **(ROUNDS | {"max_steps": 1}), eval_dataset="e")
    told = run_here(place.task(spec, inputs=both)).of("evaluated")[-1]["metrics"]
    assert told["eval_loss"] == pytest.approx(-told["eval_reward/mean"])
    assert 1 <= told["eval_episode_length"] <= 6


def test_a_stop_while_completions_are_drawn_is_heeded(place):
    asks = Asks()
    asks.should_stop = True
    events = run_here(place.task(tuned(Grpo, **ROUNDS)), asks)
    assert events.last == {"type": "stopped", "step": 0}


def test_rounds_without_anything_to_learn_are_given_up(place):
    rows = [{"prompt": word, "reference": "never said"} for word in ASKED[:2]]
    spec = tuned(Grpo, **(ROUNDS | {"max_completion_length": 1}), drop_even_groups=True)
    with pytest.raises(JobFailure, match="100 rounds in a row") as caught:
        run_here(place.task(spec, inputs=inputs_of(place, rows, "never.jsonl")))
    assert caught.value.failure_class is FailureClass.USER_ERROR


def test_a_row_without_a_reference_is_told_by_its_line(place):
    inputs = inputs_of(place, [{"prompt": "river"}], "bare.jsonl")
    with pytest.raises(JobFailure, match="line 1: no reference"):
        run_here(place.task(tuned(Grpo, **ROUNDS), inputs=inputs))


def test_long_prompts_are_left_out_or_lose_their_beginning(place):
    rows = [{"prompt": word, "reference": "x"} for word in ("river", " ".join(ASKED * 4))]
    inputs = inputs_of(place, rows, "long.jsonl")
    spec = tuned(Grpo, **(ROUNDS | {"max_steps": 1}))
    dropped = run_here(place.task(spec, inputs=inputs))
    assert dropped.last["detail"]["omitted"] == {"overlong": [1, 2]}
    cut = tuned(Grpo, **(ROUNDS | {"max_steps": 1}), overlong="truncate")
    kept = run_here(place.task(cut, inputs=inputs))
    assert kept.last["detail"]["omitted"] == {"truncated": [1, 2]}


@pytest.mark.parametrize("kind", [Grpo, Ppo])
def test_a_probe_is_a_step_of_the_longest_completions(place, kind):
    run = Run(save_seconds=3600, probe=True)
    spec = tuned(kind, **(ROUNDS | {"max_steps": 1}), run=run)
    (told,) = run_here(place.task(spec)).of("probed")
    copies = spec.num_generations
    assert told["tokens"] >= 16 * 6
    assert told["samples"] == 16 // copies


def test_a_completion_that_leaves_no_room_for_a_prompt_is_refused(place):
    spec = tuned(Grpo, **(ROUNDS | {"max_completion_length": 300, "max_length": 600}))
    with pytest.raises(JobFailure, match="leaves no room for a prompt"):
        run_here(place.task(spec))


def test_a_conversation_is_asked_as_serving_asks_it(place):
    renderer = Renderer.load(place.model)
    said = [Message(role="user", content="river"), Message(role="assistant", content="stone")]
    row = Row(1, messages=tuple(said))
    assert prompt_ids(renderer, row) == renderer.prompt_ids(row.messages[:1])


def test_alarms_are_raised_once_until_they_are_over():
    said = []
    alarms = Alarms(lambda code, _: said.append(code), kl_target=0.1)
    good = {
        "episode_length": 50.0,
        "entropy": 1.0,
        "kl_divergence": 0.0,
        "truncated": 0.1,
        "reward/std": 0.5,
    }
    for change in (
        {},
        {"episode_length": 5.0},
        {"episode_length": 5.0, "entropy": 0.01},
        {"kl_divergence": 0.6, "truncated": 0.95},
        *[{"reward/std": 0.0}] * 3,
        {"episode_length": 5.0},
    ):
        alarms.look(good | change)
    assert said == [
        "length_collapsed",
        "entropy_collapsed",
        "length_exploded",
        "kl_exceeded",
        "rewards_even",
        "length_collapsed",
    ]

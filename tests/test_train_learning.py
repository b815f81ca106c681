"""Reinforcement learns: a reward that can be checked grows, and divergence is held at a target.

From an SFT start that guesses right once in four or five times.
"""

import statistics
from typing import Any

import pytest

from rl_fixtures import ANSWERS, ASKED, MATCH, guessing, inputs_of
from train_fixtures import Events, Place, run_here, tuned
from tunesmith.spec.train import Grpo, Ppo

pytestmark = pytest.mark.slow
TASK = {
    "rewards": MATCH,
    "max_completion_length": 6,
    "max_length": 32,
    "epochs": 1000,
    "scheduler": "linear",
}
GRPO = TASK | {
    "rollout_batch_size": 4,
    "num_generations": 16,
    "batch_size": 64,
    "update_epochs": 2,
    "learning_rate": 3e-3,
    "max_steps": 160,
}
PPO = TASK | {
    "rollout_batch_size": 64,
    "batch_size": 32,
    "update_epochs": 4,
    "learning_rate": 2e-3,
    "max_steps": 240,
    "beta": 0.005,
}
UPDATES = {Grpo: 2, Ppo: 8}
"""Of a round."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return guessing(tmp_path_factory.mktemp("learning"), epochs=60, words=4)


def by_round(events: Events, kind: type[Grpo] | type[Ppo], metric: str) -> list[float]:
    told = [step["metrics"][metric] for step in events.of("step")]
    return told[:: UPDATES[kind]]


@pytest.mark.parametrize(("kind", "asked"), [(Grpo, GRPO), (Ppo, PPO)])
def test_a_reward_grows_from_a_guess_to_nearly_always(
    place: Place, kind: type[Grpo] | type[Ppo], asked: dict[str, Any]
) -> None:
    inputs = place.task(tuned(kind, **asked)).inputs
    both = inputs.model_copy(update={"eval_dataset": inputs.dataset})
    events = run_here(place.task(tuned(kind, **asked, eval_dataset="e"), inputs=both))
    assert by_round(events, kind, "reward/mean")[0] < 0.3
    assert statistics.mean(by_round(events, kind, "reward/mean")[-5:]) > 0.85
    assert events.of("evaluated")[-1]["metrics"]["eval_reward/mean"] > 0.9


def test_a_policy_learns_from_the_reward_model_that_the_job_trained_first(place: Place) -> None:
    """Told only which of two answers is better, it comes to give the best one: exact matches weigh
    nothing, and are looked at."""
    rows = [
        {"prompt": word, "chosen": ANSWERS[1], "rejected": other}
        for word in ASKED[:4]
        for other in (ANSWERS[0], *ANSWERS[2:])
    ]
    inputs = inputs_of(place, rows * 8, "pairs.jsonl")
    trained = {"kind": "trained", "learning_rate": 3e-3, "epochs": 2, "batch_size": 8}
    rewards = [trained, {"kind": "exact_match", "weight": 0}]
    asked = GRPO | {"rewards": rewards, "beta": 0.3, "mask_truncated": True}
    asked |= {"learning_rate": 1e-3, "max_steps": 100}
    events = run_here(place.task(tuned(Grpo, **asked), inputs=inputs))
    policy = [step["metrics"] for step in events.of("step") if step["trial"] is None]
    matches = [metrics["reward/exact_match"] for metrics in policy]
    assert matches[0] < 0.3
    assert statistics.mean(matches[-10:]) > 0.6


def test_divergence_is_held_near_its_target(place: Place) -> None:
    """The median of many rounds: one round's estimate, of some 200 tokens, has a heavy tail."""
    asked = PPO | {"scheduler": "constant", "max_steps": 400, "kl_target": 0.2}
    events = run_here(place.task(tuned(Ppo, **(asked | {"beta": 0.5, "kl_gain": 0.15}))))
    held = by_round(events, Ppo, "kl_divergence")[-20:]
    assert 0.1 < statistics.median(held) < 0.3

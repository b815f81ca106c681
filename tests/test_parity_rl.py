"""Reinforcement by the papers: small cases worked out by hand, and a step in plain torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nn_fixtures import HOSTED, LEAN, Outcome, largest_difference, load, write_model
from tunesmith.nn.language import open_model
from tunesmith.spec.pipe import Plan
from tunesmith.spec.train import Grpo, Ppo, Rloo
from tunesmith.train.advantages import generalised, leave_one_out, of_group, whitened
from tunesmith.train.episodes import Episodes
from tunesmith.train.grpo import GrpoLoss
from tunesmith.train.leash import Leash
from tunesmith.train.objective import Ground, Objective
from tunesmith.train.parallel import Group
from tunesmith.train.ppo import PpoLoss, ValueHead
from tunesmith.train.rloo import RlooLoss
from tunesmith.train.standing import Standing
from tunesmith.train.surrogate import Clip, clipped, clipped_value, is_clipped, k1, k3

MODELS = LEAN | HOSTED
MATCH = ({"kind": "exact_match"},)
TEMPERATURE = 0.7


def test_advantages_of_a_group_are_its_standardised_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    spread = math.sqrt(1 / 3)
    half = 0.5 / (spread + 1e-4)
    group = torch.tensor([[half, -half, -half, half], [0.0] * 4])
    assert of_group(rewards, "group") == pytest.approx(group)
    assert of_group(rewards, "none")[0] == pytest.approx(torch.tensor([0.5, -0.5, -0.5, 0.5]))
    variance = (2 * 0.75**2 + 2 * 1.75**2 + 4 * 1.25**2) / 7
    batch = 0.5 / (math.sqrt(variance) + 1e-4)
    assert of_group(rewards, "batch")[0, 0] == pytest.approx(batch)


def test_the_baseline_of_rloo_is_the_mean_of_the_others():
    found = leave_one_out(torch.tensor([[1.0, 0.0, 0.5, 0.0]]))
    expected = [1 - 0.5 / 3, 0 - 1.5 / 3, 0.5 - 1 / 3, 0 - 1.5 / 3]
    assert found[0] == pytest.approx(torch.tensor(expected))


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 0.95, [0.1 + 0.95 * 0.385, 0.1 + 0.95 * 0.3, 0.3]),
        (0.9, 0.5, [0.04 + 0.45 * (0.03 + 0.45 * 0.3), 0.03 + 0.45 * 0.3, 0.3]),
        (1.0, 1.0, [0.5, 0.4, 0.3]),
        (1.0, 0.0, [0.1, 0.1, 0.3]),
    ],
)
def test_generalised_advantages_by_hand(gamma, lam, expected):
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.6, 0.7])
    assert generalised(rewards, values, gamma, lam) == pytest.approx(torch.tensor(expected))


def test_whitened_values_have_mean_0_and_variance_1_or_their_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert whitened(values).mean() == pytest.approx(0, abs=1e-6)
    assert whitened(values).var(unbiased=False) == pytest.approx(1)
    assert whitened(values, keeps_mean=True).mean() == pytest.approx(3)


def test_a_ratio_is_clipped_where_it_would_gain():
    ratios = torch.tensor([1.5, 0.5, 0.5, 1.5, 1.1])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    found = clipped(ratios.log(), advantages, Clip(0.2, 0.28))
    assert found == pytest.approx(torch.tensor([-1.28, -0.5, 0.8, 1.5, -2.2]))
    told = is_clipped(ratios.log(), advantages, Clip(0.2, 0.28))
    assert told.tolist() == [True, False, True, False, False]


def test_a_value_gains_nothing_beyond_its_reach():
    values, old, returns = torch.tensor([2.0, 0.0, 1.1]), torch.ones(3), torch.zeros(3)
    found = clipped_value(values, old, returns, 0.2)
    assert found == pytest.approx(torch.tensor([0.5 * 4, 0.5 * 0.64, 0.5 * 1.21]))


def test_divergence_by_two_estimators():
    now, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert k1(now, reference).tolist() == [0.5, -1.0]
    expected = [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1]
    assert k3(now, reference) == pytest.approx(torch.tensor(expected))


def test_both_estimators_are_the_divergence_in_the_mean():
    torch.manual_seed(0)
    p, q = torch.randn(2, 9).log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    for estimate in (k1, k3):
        assert float((p.exp() * estimate(p, q)).sum()) == pytest.approx(exact, abs=1e-6)


def test_beta_grows_above_the_target_and_shrinks_below_it():
    leash = Leash(0.2, target=6.0, gain=0.1)
    leash.follow(6.6)
    assert leash.beta == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    leash.follow(60)
    assert leash.beta == pytest.approx(0.2 * 1.01 * 1.02)
    leash.follow(0)
    assert leash.beta == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    still = Leash(0.2)
    still.follow(60)
    assert still.beta == 0.2


DICE = torch.Generator().manual_seed(11)
PROMPTS = [torch.randint(3, 99, (size,), generator=DICE).tolist() for size in (6, 17)]
SIZES = (4, 1, 7, 3, 9, 2)
COMPLETIONS = [torch.randint(3, 99, (size,), generator=DICE).tolist() for size in SIZES]
ADVANTAGES = torch.randn(len(SIZES), generator=DICE)


@dataclass(frozen=True)
class Case:
    """Two prompts with three completions each, drawn by a policy a little way off."""

    model: Any
    old: list[Tensor]
    reference: list[Tensor]

    @classmethod
    def of(cls, folder: Path) -> "Case":
        model = load(folder)
        with torch.no_grad():
            now = [log_probs(model, number) for number in range(len(SIZES))]
        dice = torch.Generator().manual_seed(12)
        old = [each + 0.3 * torch.randn(each.shape, generator=dice) for each in now]
        away = [each + 0.5 * torch.randn(each.shape, generator=dice) for each in now]
        return cls(model, old, away)

    def episodes(self, **more: Tensor) -> Episodes:
        by_token = {"old": torch.cat(self.old), "reference": torch.cat(self.reference), **more}
        spread = ADVANTAGES.repeat_interleave(torch.tensor(SIZES))
        return Episodes(
            PROMPTS,
            COMPLETIONS,
            {"advantage": spread, **by_token},
            torch.ones(len(SIZES), dtype=torch.bool),
            beta=0.1,
        )


def log_probs(model: Any, number: int) -> Tensor:
    prompt, told = PROMPTS[number // 3], COMPLETIONS[number]
    logits = model(input_ids=torch.tensor([[*prompt, *told]])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(told)[:, None])[:, 0]


def grpo_loss(case: Case, spec: Grpo) -> Tensor:
    """As the papers write it, a completion after the other."""
    high = spec.epsilon_high or spec.epsilon
    sums = []
    for number in range(len(SIZES)):
        now = log_probs(case.model, number)
        ratio = torch.exp(now - case.old[number])
        gain = torch.min(
            ratio * ADVANTAGES[number],
            torch.clamp(ratio, 1 - spec.epsilon, 1 + high) * ADVANTAGES[number],
        )
        away = case.reference[number] - now
        each = gain - 0.1 * (torch.exp(away) - away - 1)
        sums.append(each.mean() if spec.loss == "grpo" else each.sum())
    total = -torch.stack(sums).sum()
    over = {"grpo": 6, "dapo": sum(SIZES), "dr_grpo": 6 * spec.max_completion_length}
    return total / over[spec.loss]


def rloo_loss(case: Case, spec: Rloo) -> Tensor:
    losses = []
    for number in range(len(SIZES)):
        ratio = torch.exp((log_probs(case.model, number) - case.old[number]).sum())
        bounded = torch.clamp(ratio, 1 - spec.epsilon, 1 + spec.epsilon)
        losses.append(-torch.min(ratio * ADVANTAGES[number], bounded * ADVANTAGES[number]))
    return torch.stack(losses).mean()


WIDTH = 64
HEAD = torch.randn(WIDTH, generator=DICE)
VALUES = torch.randn(sum(SIZES), generator=DICE)
RETURNS = torch.randn(sum(SIZES), generator=DICE)


def ppo_loss(case: Case, spec: Ppo, head: Tensor) -> Tensor:
    losses = []
    parts = [each.split(list(SIZES)) for each in (VALUES, RETURNS)]
    for number, (old_value, target) in enumerate(zip(*parts, strict=True)):
        prompt, told = PROMPTS[number // 3], COMPLETIONS[number]
        ids = torch.tensor([[*prompt, *told]])
        out = case.model.base_model(input_ids=ids).last_hidden_state[0]
        value = out[len(prompt) - 1 : -1] @ head
        near = torch.clamp(value, old_value - spec.value_epsilon, old_value + spec.value_epsilon)
        error = torch.max((value - target) ** 2, (near - target) ** 2)
        ratio = torch.exp(log_probs(case.model, number) - case.old[number])
        bounded = torch.clamp(ratio, 1 - spec.epsilon, 1 + spec.epsilon)
        gain = torch.min(ratio * ADVANTAGES[number], bounded * ADVANTAGES[number])
        losses.append(-gain + spec.value_weight * 0.5 * error)
    return torch.cat(losses).mean()


def our_outcome(objective: Objective[Any], episodes: Episodes, budget: int) -> Outcome:
    bundles = episodes.bundles([3, 4, 5, 0, 2, 1], budget)
    loss: Tensor = sum(one.loss for one in objective.passes(bundles)) / objective.units(bundles)
    loss.backward()
    model = objective.ground.model
    with torch.no_grad():
        for one in model.trainable().values():
            one.copy_(torch.zeros_like(one) if one.grad is None else one.grad)
    return Outcome(loss.item(), {name: one.clone() for name, one in model.weights().items()})


def their_outcome(case: Case, loss: Tensor) -> Outcome:
    loss.backward()
    named = case.model.named_parameters()
    return Outcome(loss.item(), {name: one.grad for name, one in named if one.grad is not None})


@pytest.mark.parametrize("budget", [1000, 12])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("llama, grouped queries", "dapo"),
        ("llama, grouped queries", "grpo"),
        ("gpt2", "dr_grpo"),
        ("phi", "dapo"),
        ("gemma2", "grpo"),
        ("gpt2", "rloo"),
        ("llama, grouped queries", "ppo"),
        ("phi", "ppo"),
    ],
)
def test_a_step_is_the_one_in_plain_torch(name, loss, budget, tmp_path):
    common = {
        "model": "m",
        "dataset": "d",
        "rewards": MATCH,
        "temperature": TEMPERATURE,
        "max_completion_length": 9,
    }
    folder = write_model(MODELS[name], tmp_path)
    case = Case.of(tmp_path)
    model = open_model(folder, lora=None, has_dropout=False)
    ground = Ground(model, "cpu", Standing(Plan(threads=1, micro_batch_tokens=budget)), Group())
    objective: Objective[Any]
    by_token: dict[str, Tensor] = {}
    if loss == "ppo":
        ppo, head = Ppo.model_validate(common), HEAD.clone().requires_grad_()
        ours_head = ValueHead(WIDTH, "cpu")
        with torch.no_grad():
            ours_head.weight_H.copy_(HEAD)
        objective, theirs = PpoLoss(ppo, ground, ours_head), ppo_loss(case, ppo, head)
        by_token = {"value": VALUES, "return": RETURNS}
    elif loss == "rloo":
        rloo = Rloo.model_validate(common)
        objective, theirs = RlooLoss(rloo, ground), rloo_loss(case, rloo)
    else:
        grpo = Grpo.model_validate({**common, "loss": loss, "epsilon_high": 0.28})
        objective, theirs = GrpoLoss(grpo, ground), grpo_loss(case, grpo)
    ours = our_outcome(objective, case.episodes(**by_token), budget)
    expected = their_outcome(case, theirs)
    assert ours.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-6)
    assert largest_difference(ours, expected) < 1e-4
    if loss == "ppo":
        assert ours_head.weight_H.grad == pytest.approx(head.grad, rel=1e-4, abs=1e-6)


def test_rewards_of_ppo_are_the_completions_last_and_less_what_divergence_costs(tmp_path):
    model = open_model(write_model(LEAN["gpt2"], tmp_path), lora=None)
    spec = Ppo.model_validate({"model": "m", "dataset": "d", "rewards": MATCH, "lam": 1.0})
    loss = PpoLoss(
        spec,
        Ground(model, "cpu", Standing(Plan(threads=1, micro_batch_tokens=1000)), Group()),
        ValueHead(64, "cpu"),
    )
    old = [torch.zeros(size) for size in SIZES]
    case = Case(None, old, [each - 1 for each in old])
    found = loss.estimate(case.episodes(), torch.arange(6.0))
    returns = found["return"].split(list(SIZES))
    # What is still to come: the reward, less 0.1 for every token from here on.
    expected = [4 - 0.1 * left for left in range(9, 0, -1)]
    assert returns[4] == pytest.approx(torch.tensor(expected), abs=1e-5)
    assert found["advantage"].mean() == pytest.approx(0, abs=1e-6)
    assert not found["value"].any()

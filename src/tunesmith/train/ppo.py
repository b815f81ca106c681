"""Proximal policy optimisation: every token is an action, and a value head tells what to expect.

T tokens of a round or of a pass, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tunesmith.nn.forks import ForkBatch
from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Ppo
from tunesmith.train.advantages import generalised, whitened
from tunesmith.train.episodes import Bundle, Episodes, Laid, measure
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.surrogate import Clip, clipped, clipped_value, is_clipped, k1


class ValueHead:
    """A number for each hidden state: at first 0."""

    def __init__(self, width: int, device: str) -> None:
        self.weight_H = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def __call__(self, states_TH: Tensor) -> Tensor:
        return states_TH.float() @ self.weight_H + self.bias

    def named(self) -> dict[str, nn.Parameter]:
        return {"value_head.weight": self.weight_H, "value_head.bias": self.bias}

    def kept(self) -> Mapping[str, Tensor]:
        return {name: one.detach() for name, one in self.named().items()}

    def take(self, kept: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, one in self.named().items():
                one.copy_(kept[name])


@dataclass(frozen=True)
class PpoLoss(Objective[Bundle]):
    """The clipped objective (Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9) with the rewards
    of Ziegler et al. 2019 (arXiv:1909.08593, eq. 2): the completion's at its last token, and at
    each token what divergence costs. Advantages are whitened over the round."""

    spec: Ppo
    ground: Ground[LanguageModel]
    head: ValueHead
    names: ClassVar[tuple[str, ...]] = ("clip_fraction", "policy_loss", "value_loss")

    @property
    def beside(self) -> Mapping[str, nn.Parameter]:
        return self.head.named()

    def estimate(self, episodes: Episodes, rewards_N: Tensor) -> Mapping[str, Tensor]:
        """See `rounds.Estimate`."""
        values_T = measure(self.ground, episodes, self._values)
        rewards_T = self._rewards(episodes, rewards_N)
        sizes = episodes.sizes
        advantages_T = torch.cat(
            [
                generalised(rewards, values, self.spec.gamma, self.spec.lam)
                for rewards, values in zip(
                    rewards_T.split_with_sizes(sizes), values_T.split_with_sizes(sizes), strict=True
                )
            ]
        )
        return {
            "advantage": whitened(advantages_T),
            "return": advantages_T + values_T,
            "value": values_T,
        }

    def _rewards(self, episodes: Episodes, rewards_N: Tensor) -> Tensor:
        rewards_T = torch.zeros_like(episodes.by_token["old"])
        if episodes.beta:
            away_T = k1(episodes.by_token["old"], episodes.by_token["reference"])
            rewards_T -= episodes.beta * away_T
        rewards_T[episodes.sizes_N.cumsum(0) - 1] += rewards_N
        return whitened(rewards_T, keeps_mean=True) if self.spec.whiten_rewards else rewards_T

    def _values(self, batch: ForkBatch) -> Tensor:
        return self.head(self.ground.model.states(batch.flat))

    def units(self, samples: Sequence[Bundle]) -> int:
        return sum(one.labels for one in samples)

    def passes(self, samples: Sequence[Bundle]) -> Iterator[Measured]:
        spec, clip = self.spec, Clip(self.spec.epsilon, self.spec.epsilon)
        for part in self.ground.parts(samples):
            laid = Laid.out(self.ground, part)
            found = self.ground.model.log_probs_and_states(laid.batch.flat, spec.temperature)
            log_ratio_T = found[0] - laid.by_token["old"]
            advantages_T = laid.by_token["advantage"]
            policy_T = clipped(log_ratio_T, advantages_T, clip)
            value_T = clipped_value(
                self.head(found[1]),
                laid.by_token["value"],
                laid.by_token["return"],
                spec.value_epsilon,
            )
            is_clipped_T = is_clipped(log_ratio_T, advantages_T, clip).double()
            told = totals(is_clipped_T, policy_T, value_T)
            yield Measured((policy_T + spec.value_weight * value_T).sum(), told)

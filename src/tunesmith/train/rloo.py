"""REINFORCE with a prompt's other completions as its baseline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Rloo
from tunesmith.train.advantages import leave_one_out, whitened
from tunesmith.train.episodes import Bundle, Episodes, Laid
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.surrogate import Clip, clipped, is_clipped, k1


@dataclass(frozen=True)
class RlooLoss(Objective[Bundle]):
    """A completion is one action; divergence is taken off its reward (Ahmadian et al. 2024,
    arXiv:2402.14740, eq. 1 and 7). As in TRL its ratio is clipped, which changes nothing in the
    first update of a round: there the gradient is REINFORCE's."""

    spec: Rloo
    ground: Ground[LanguageModel]
    names: ClassVar[tuple[str, ...]] = ("clip_fraction",)

    def estimate(self, episodes: Episodes, rewards_N: Tensor) -> Mapping[str, Tensor]:
        """See `rounds.Estimate`."""
        if episodes.beta:
            away_T = k1(episodes.by_token["old"], episodes.by_token["reference"])
            rewards_N = rewards_N - episodes.beta * episodes.per_completion(away_T)
        advantages_Gn = leave_one_out(rewards_N.view(-1, self.spec.num_generations))
        if self.spec.normalise_advantages:
            advantages_Gn = whitened(advantages_Gn)
        return {"advantage": episodes.spread(advantages_Gn.flatten())}

    def units(self, samples: Sequence[Bundle]) -> int:
        return sum(one.completions for one in samples)

    def passes(self, samples: Sequence[Bundle]) -> Iterator[Measured]:
        clip = Clip(self.spec.epsilon, self.spec.epsilon)
        for part in self.ground.parts(samples):
            laid = Laid.out(self.ground, part)
            log_probs_T = self.ground.model.log_probs(laid.batch.flat, self.spec.temperature)
            log_ratio_N = laid.batch.sums(log_probs_T - laid.by_token["old"])
            advantages_N = laid.batch.sums(laid.by_token["advantage"]) / laid.batch.counts()
            losses_N = clipped(log_ratio_N, advantages_N, clip)
            told = totals(is_clipped(log_ratio_N, advantages_N, clip).double())
            yield Measured(losses_N.sum(), told)

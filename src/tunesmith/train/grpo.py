"""Group relative policy optimisation, with the changes of Dr. GRPO and DAPO as options."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Grpo
from tunesmith.train.advantages import of_group
from tunesmith.train.episodes import Bundle, Episodes, Laid
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.surrogate import Clip, clipped, is_clipped, k3


@dataclass(frozen=True)
class GrpoLoss(Objective[Bundle]):
    """Clipped ratios of every token, times its completion's advantage over its group, and beta
    times the divergence (Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4)."""

    spec: Grpo
    ground: Ground[LanguageModel]
    names: ClassVar[tuple[str, ...]] = ("clip_fraction",)

    def estimate(self, episodes: Episodes, rewards_N: Tensor) -> Mapping[str, Tensor]:
        """See `rounds.Estimate`."""
        rewards_Gn = rewards_N.view(-1, self.spec.num_generations)
        advantages_Gn = of_group(rewards_Gn, self.spec.scale)
        return {"advantage": episodes.spread(advantages_Gn.flatten())}

    def units(self, samples: Sequence[Bundle]) -> int:
        """Tokens, completions, or tokens that completions could have had: see `Grpo.loss`."""
        if self.spec.loss == "dapo":
            return sum(one.labels for one in samples)
        completions = sum(one.completions for one in samples)
        return completions * (self.spec.max_completion_length if self.spec.loss == "dr_grpo" else 1)

    def passes(self, samples: Sequence[Bundle]) -> Iterator[Measured]:
        clip = Clip(self.spec.epsilon, self.spec.epsilon_high or self.spec.epsilon)
        for part in self.ground.parts(samples):
            laid = Laid.out(self.ground, part)
            log_probs_T = self.ground.model.log_probs(laid.batch.flat, self.spec.temperature)
            log_ratio_T = log_probs_T - laid.by_token["old"]
            advantages_T = laid.by_token["advantage"]
            losses_T = clipped(log_ratio_T, advantages_T, clip)
            if part[0].beta:
                losses_T = losses_T + part[0].beta * k3(log_probs_T, laid.by_token["reference"])
            if self.spec.loss == "grpo":
                losses_T = losses_T / laid.batch.counts()[laid.batch.owners_A]
            told = totals(is_clipped(log_ratio_T, advantages_T, clip).double())
            yield Measured(losses_T.sum(), told)

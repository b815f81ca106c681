"""How a policy is rewarded for held-out prompts: one likeliest completion each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Reinforcing
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.prompts import Prompt
from tunesmith.train.rounds import Drawer


@dataclass(frozen=True)
class RewardedDraws(Objective[Prompt]):
    """For evaluation only; its loss is what is lost: the mean reward, negative."""

    spec: Reinforcing
    ground: Ground[LanguageModel]
    drawer: Drawer
    names: ClassVar[tuple[str, ...]] = ("reward/mean", "episode_length")

    def units(self, samples: Sequence[Prompt]) -> int:
        return len(samples)

    def passes(self, samples: Sequence[Prompt]) -> Iterator[Measured]:
        mine = self.ground.group.share(samples)
        if not mine:
            return
        drawer = replace(self.drawer, wish=replace(self.drawer.wish, temperature=0))
        drawn, scores = drawer.draw(mine, 1, 0)
        rewards_N = drawer.total(torch.tensor(scores, dtype=torch.float64))
        lengths_N = torch.tensor([float(len(one.ids)) for one in drawn])
        yield Measured(-rewards_N.sum(), totals(rewards_N, lengths_N))

    def told(self, means: Mapping[str, float]) -> dict[str, float]:
        return dict(means)

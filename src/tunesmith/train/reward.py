"""Reward models: a score for each sequence, higher for the answer that was chosen. P pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from tunesmith.nn.forks import flatten_ends
from tunesmith.nn.language import ScoringModel
from tunesmith.spec.train import Reward
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.pairs import Pair


@dataclass(frozen=True)
class RewardLoss(Objective[Pair]):
    """-log sigmoid(chosen score - rejected score - margin) (Bradley and Terry 1952; Ouyang et al.
    2022, arXiv:2203.02155, eq. 1; the margin as in Touvron et al. 2023, arXiv:2307.09288, eq. 2).

    The score of a sequence is read at its last token.
    """

    spec: Reward
    ground: Ground[ScoringModel]
    names: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "mean_reward")
    """As TRL names them."""

    def units(self, samples: Sequence[Pair]) -> int:
        return len(samples)

    def passes(self, samples: Sequence[Pair]) -> Iterator[Measured]:
        model, device = self.ground.model, self.ground.device
        for part in self.ground.parts(samples):
            forks = [pair.fork for pair in part]
            batch = flatten_ends(forks, device, is_shared=model.can_share_prompts)
            scores_P2 = model.scores(batch).view(-1, 2)
            margin_P = torch.tensor([pair.margin for pair in part]).to(device)
            difference_P = scores_P2[:, 0] - scores_P2[:, 1]
            losses_P = -F.logsigmoid(difference_P - margin_P)
            if self.spec.center:
                losses_P = losses_P + self.spec.center * scores_P2.sum(1) ** 2
            is_right_P = (difference_P > 0).double()
            told = totals(is_right_P, difference_P, scores_P2)
            yield Measured(losses_P.sum(), told)

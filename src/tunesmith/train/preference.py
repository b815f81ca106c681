"""Learning from pairs: what each published loss makes of a chosen and a rejected answer.

P pairs. A log-ratio is log p(answer) less what the model gave it before it was trained.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Cpo, Orpo, PairLoss, Preference, Simpo
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.pairs import Pair, pair_logps, places
from tunesmith.train.reference import Reference

REWARDS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Named as TRL names them."""


@dataclass(frozen=True)
class Ratios:
    """Log-ratios of P pairs, times beta."""

    chosen_P: Tensor
    rejected_P: Tensor
    beta: float
    smoothing: float

    @property
    def margin_P(self) -> Tensor:
        return self.chosen_P - self.rejected_P


def sigmoid(ratios: Ratios) -> Tensor:
    """-log sigmoid of the margin: DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With smoothing e it is conservative DPO: (1 - e) of that, and e of it with the order reversed
    (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    return _smoothed(ratios.margin_P, ratios.smoothing)


def _smoothed(margin_P: Tensor, smoothing: float) -> Tensor:
    if not smoothing:
        return -F.logsigmoid(margin_P)
    kept, reversed_ = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    return (1 - smoothing) * kept + smoothing * reversed_


def robust(ratios: Ratios) -> Tensor:
    """An unbiased estimate of DPO's loss where a share e of pairs is the wrong way round
    (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12)."""
    share = ratios.smoothing
    kept, reversed_ = -F.logsigmoid(ratios.margin_P), -F.logsigmoid(-ratios.margin_P)
    return ((1 - share) * kept - share * reversed_) / (1 - 2 * share)


def hinge(ratios: Ratios) -> Tensor:
    """max(0, 1 - margin): SLiC (Zhao et al. 2023, arXiv:2305.10425), as written for log-ratios by
    Liu et al. 2023 (RSO, arXiv:2309.06657, eq. 10)."""
    return torch.relu(1 - ratios.margin_P)


def ipo(ratios: Ratios) -> Tensor:
    """(difference of log-ratios by token - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036,
    eq. 17, with beta for tau; by token as its authors confirmed to TRL)."""
    return (ratios.margin_P / ratios.beta - 1 / (2 * ratios.beta)) ** 2


def exo_pair(ratios: Ratios) -> Tensor:
    """KL(softmax of the pair's log-ratios || (1 - e, e)) (Ji et al. 2024, arXiv:2402.00856,
    eq. 16)."""
    margin_P, share = ratios.margin_P, ratios.smoothing
    chosen_P = margin_P.sigmoid() * (F.logsigmoid(margin_P) - math.log1p(-share))
    return chosen_P + (-margin_P).sigmoid() * (F.logsigmoid(-margin_P) - math.log(share))


def nca_pair(ratios: Ratios) -> Tensor:
    """Noise contrastive alignment of two answers (Chen et al. 2024, arXiv:2402.05369, eq. 12)."""
    chosen_P, rejected_P = ratios.chosen_P, ratios.rejected_P
    against_P = F.logsigmoid(-chosen_P) + F.logsigmoid(-rejected_P)
    return -F.logsigmoid(chosen_P) - 0.5 * against_P


def sppo_hard(ratios: Ratios) -> Tensor:
    """Self-play with a win probability of 1 and 0 (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)."""
    half = 0.5 / ratios.beta
    chosen_P, rejected_P = ratios.chosen_P / ratios.beta, ratios.rejected_P / ratios.beta
    return (chosen_P - half) ** 2 + (rejected_P + half) ** 2


def apo_zero(ratios: Ratios) -> Tensor:
    """Chosen answers up and rejected ones down (D'Oosterlinck et al. 2024, arXiv:2408.06266,
    eq. 7)."""
    return 1 - ratios.chosen_P.sigmoid() + ratios.rejected_P.sigmoid()


def apo_down(ratios: Ratios) -> Tensor:
    """Both down, rejected ones more: where the model is better than what was chosen (as apo_zero,
    eq. 8)."""
    return ratios.chosen_P.sigmoid() + 1 - ratios.margin_P.sigmoid()


LOSSES: Mapping[PairLoss, Callable[[Ratios], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}


@dataclass(frozen=True)
class DpoLoss(Objective[Pair]):
    """Log-ratios against the model as it was opened."""

    spec: Preference
    ground: Ground[LanguageModel]
    reference: Reference
    names: ClassVar[tuple[str, ...]] = REWARDS

    @torch.no_grad()
    def measure(self, steps: Iterable[Sequence[Pair]]) -> None:
        """Fill the reference; to be called before the first update."""
        for samples in steps:
            found_N2 = torch.full((len(samples), 2), torch.nan)
            at = {pair.place: number for number, pair in enumerate(samples)}
            for part in self.ground.parts(samples):
                sums_P2 = pair_logps(self.ground, part).sums_P2.cpu()
                found_N2[[at[pair.place] for pair in part]] = sums_P2
            self.reference.put(places(samples), found_N2, self.ground.group)

    def units(self, samples: Sequence[Pair]) -> int:
        return len(samples)

    def passes(self, samples: Sequence[Pair]) -> Iterator[Measured]:
        spec = self.spec
        for part in self.ground.parts(samples):
            logps = pair_logps(self.ground, part)
            reference_P2 = self.reference.at(places(part), self.ground.device)
            ratios_P2 = spec.beta * (logps.sums_P2 - reference_P2)
            is_by_token = spec.length_normalised or spec.loss == "ipo"
            weighed_P2 = ratios_P2 / logps.counts_P2 if is_by_token else ratios_P2
            chosen_P, rejected_P = weighed_P2.unbind(1)
            ratios = Ratios(chosen_P, rejected_P, spec.beta, spec.label_smoothing)
            losses_P = LOSSES[spec.loss](ratios)
            yield Measured(losses_P.sum(), rewards(ratios_P2, logps.sums_P2))


def rewards(rewards_P2: Tensor, logps_P2: Tensor, *more: Tensor) -> Tensor:
    """The totals of `REWARDS`, and of more metrics."""
    chosen_P, rejected_P = rewards_P2.unbind(1)
    is_right_P = (chosen_P > rejected_P).double()
    margins_P = chosen_P - rejected_P
    return totals(chosen_P, rejected_P, is_right_P, margins_P, *logps_P2.unbind(1), *more)


@dataclass(frozen=True)
class OrpoLoss(Objective[Pair]):
    """-log p(chosen sequence) by token, and beta times -log sigmoid of the log odds ratio of the
    answers' mean probabilities by token (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7).

    As TRL has it, the prompt's tokens count in the first part.
    """

    spec: Orpo
    ground: Ground[LanguageModel]
    names: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss", "log_odds_ratio", "log_odds_chosen")

    def units(self, samples: Sequence[Pair]) -> int:
        return len(samples)

    def passes(self, samples: Sequence[Pair]) -> Iterator[Measured]:
        tokens = sum(len(one.fork.prompt) + len(one.fork.answers[0][0]) - 1 for one in samples)
        share = len(samples) / tokens
        for part in self.ground.parts(samples):
            logps = pair_logps(self.ground, part, is_whole=True)
            means_P2 = logps.means_P2
            odds_P2 = means_P2 - log_one_less_exp(means_P2)
            odds_P = odds_P2[:, 0] - odds_P2[:, 1]
            ratio_P = F.logsigmoid(odds_P)
            likelihood = -(logps.sums_P2[:, 0].sum() + logps.rest) * share
            told = rewards(self.spec.beta * means_P2, means_P2)
            told = torch.cat((told, _shared_out(likelihood, part), totals(ratio_P, odds_P)))
            yield Measured(likelihood - self.spec.beta * ratio_P.sum(), told)


def _shared_out(total: Tensor, part: Sequence[Pair]) -> Tensor:
    """The totals of one metric that is a sum over a pass's pairs."""
    return torch.stack((total.detach().double(), total.new_tensor(len(part)).double()))[None]


def log_one_less_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, in the way that keeps its digits (Mächler 2012, "Accurately
    computing log(1 - exp(-|a|))")."""
    is_near = x > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(is_near, x, x.new_tensor(-1.0))))
    far = torch.log1p(-torch.exp(torch.where(is_near, x.new_tensor(-1.0), x)))
    return torch.where(is_near, near, far)


@dataclass(frozen=True)
class CpoLoss(Objective[Pair]):
    """A loss of the margin of log-probabilities, and alpha times -log p(chosen) by token.

    CPO (Xu et al. 2024, arXiv:2401.08417, eq. 3): beta times the sums' margin. SimPO (Meng et al.
    2024, arXiv:2405.14734, eq. 6): beta times the means' margin, less gamma.
    """

    spec: Cpo | Simpo
    ground: Ground[LanguageModel]
    names: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss")

    def units(self, samples: Sequence[Pair]) -> int:
        return len(samples)

    def passes(self, samples: Sequence[Pair]) -> Iterator[Measured]:
        labels = sum(one.chosen_labels for one in samples)
        share = len(samples) / labels
        for part in self.ground.parts(samples):
            logps = pair_logps(self.ground, part)
            values_P2 = logps.means_P2 if isinstance(self.spec, Simpo) else logps.sums_P2
            losses_P = self._losses(self.spec.beta * (values_P2[:, 0] - values_P2[:, 1]))
            likelihood = -logps.sums_P2[:, 0].sum() * share
            told = rewards(self.spec.beta * values_P2, values_P2)
            loss = losses_P.sum() + self.spec.alpha * likelihood
            yield Measured(loss, torch.cat((told, _shared_out(likelihood, part))))

    def _losses(self, margin_P: Tensor) -> Tensor:
        if isinstance(self.spec, Simpo):
            return -F.logsigmoid(margin_P - self.spec.gamma)
        if self.spec.loss == "hinge":
            return torch.relu(1 - margin_P)
        return _smoothed(margin_P, self.spec.label_smoothing)

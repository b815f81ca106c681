"""Learning from single answers, each wanted or not: KTO (Ethayarajh et al. 2024, arXiv:2402.01306).

N samples of a step.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.data.fit import Cut
from tunesmith.data.render import Encoded, Renderer
from tunesmith.data.rows import Row
from tunesmith.nn.forks import Fork, flatten_forks
from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Kto
from tunesmith.train.objective import Ground, Measured, Objective, totals
from tunesmith.train.pairs import cut_short
from tunesmith.train.reference import Reference
from tunesmith.train.source import Notes, RowSource, encode, fits


@dataclass(frozen=True, slots=True)
class Judged:
    place: int
    fork: Fork
    """One answer."""
    labels: int
    is_wanted: bool

    @property
    def tokens(self) -> int:
        return self.fork.tokens


@dataclass(frozen=True)
class JudgedReader:
    """A row is one answer with its label, or a pair: its chosen answer, then its rejected one."""

    renderer: Renderer
    cut: Cut
    samples_a_row: int

    def read(self, row: Row, place: int, notes: Notes) -> Judged | None:
        is_first = place % self.samples_a_row == 0
        told = row if is_first else row.rejected
        assert told is not None, "a file of pairs"
        encoded = encode(self.renderer, told, notes)
        if encoded is None or not fits(self.cut, len(encoded.ids), row.line, notes):
            return None
        encoded = cut_short(encoded, self.cut)
        labels = sum(encoded.mask[1:])
        if not labels:
            notes.reasons.append("masked")
            return None
        is_wanted = is_first if row.label is None else row.label
        return Judged(place, _parted(encoded), labels, is_wanted)


def _parted(encoded: Encoded) -> Fork:
    start = encoded.mask.index(True)
    answer = (array("i", encoded.ids[start:]), encoded.mask[start:])
    return Fork(array("i", encoded.ids[:start]), (answer,))


@dataclass(frozen=True)
class KtoLoss(Objective[Judged]):
    """Eq. 7 and 8: a wanted answer's weight times 1 - sigmoid(beta (r - z)), an unwanted one's
    times 1 - sigmoid(beta (z - r)), with r the log-ratio against the model as it was opened.

    z, what KL divergence there is, is the mean log-ratio of answers to prompts that are not their
    own, at least 0, and takes no gradient: each prompt's is that of the sample before it in its
    step of the first epoch.
    """

    spec: Kto
    ground: Ground[LanguageModel]
    reference: Reference
    source: RowSource[Judged]
    max_length: int
    is_exchanging: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )

    def measure(self, steps: Iterable[Sequence[Judged]]) -> None:
        """Fill the reference; to be called before the first update."""
        for samples in steps:
            places_N = _places(samples)
            self.reference.partners_N[places_N] = places_N.roll(1).int()
            forks = [
                Fork(one.fork.prompt, (*one.fork.answers, *self._mismatched(one).answers))
                for one in samples
            ]
            logps_N2 = self._logps(samples, forks, 2)
            self.reference.put(places_N, logps_N2, self.ground.group)

    def units(self, samples: Sequence[Judged]) -> int:
        return len(samples)

    def passes(self, samples: Sequence[Judged]) -> Iterator[Measured]:
        divergence = self._divergence(samples)
        for part in self.ground.parts(samples):
            logps_N = self._sums([one.fork for one in part])
            reference_N2 = self.reference.at(_places(part), self.ground.device)
            ratios_N = self.spec.beta * (logps_N - reference_N2[:, 0])
            is_wanted_N = torch.tensor([one.is_wanted for one in part]).to(self.ground.device)
            sign_N = torch.where(is_wanted_N, 1.0, -1.0)
            weight_N = torch.where(
                is_wanted_N, self.spec.desirable_weight, self.spec.undesirable_weight
            )
            gain_N = sign_N * (ratios_N - self.spec.beta * divergence)
            losses_N = weight_N * (1 - gain_N.sigmoid())
            both = [
                values_N[wanted_N]
                for values_N in (ratios_N, logps_N)
                for wanted_N in (is_wanted_N, ~is_wanted_N)
            ]
            told = totals(*both, torch.full_like(ratios_N, divergence))
            yield Measured(losses_N.sum(), told)

    def told(self, means: Mapping[str, float]) -> dict[str, float]:
        told = dict(means)
        if "rewards/chosen" in told and "rewards/rejected" in told:
            told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
        return told

    def _divergence(self, samples: Sequence[Judged]) -> float:
        logps_N1 = self._logps(samples, [self._mismatched(one) for one in samples], 1)
        places_N = _places(samples)
        ratios_N = logps_N1[:, 0] - self.reference.at(places_N, "cpu")[:, 1]
        [total] = self.ground.group.add_up(float(ratios_N.double().nansum()))
        return max(0.0, total / len(samples))

    def _mismatched(self, sample: Judged) -> Fork:
        """Another's answer after this one's prompt, cut to fit."""
        partner = int(self.reference.partners_N[sample.place])
        ids, mask = self.source.sample(partner).fork.answers[0]
        room = max(1, self.max_length - len(sample.fork.prompt))
        return Fork(sample.fork.prompt, ((ids[:room], mask[:room]),))

    def _logps(self, samples: Sequence[Judged], forks: Sequence[Fork], answers: int) -> Tensor:
        """(N, answers) without gradients; not a number for other processes' samples."""
        by_place = dict(zip((one.place for one in samples), forks, strict=True))
        at = {place: number for number, place in enumerate(by_place)}
        found = torch.full((len(samples), answers), torch.nan)
        for part in self.ground.parts(samples):
            with torch.no_grad():
                sums = self._sums([by_place[one.place] for one in part])
            found[[at[one.place] for one in part]] = sums.view(-1, answers).cpu()
        return found

    def _sums(self, forks: Sequence[Fork]) -> Tensor:
        model = self.ground.model
        batch = flatten_forks(forks, self.ground.device, is_shared=model.can_share_prompts)
        return batch.sums(model.log_probs(batch.flat))


def _places(samples: Sequence[Judged]) -> Tensor:
    return torch.tensor([one.place for one in samples], dtype=torch.int64)

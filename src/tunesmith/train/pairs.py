"""Pairs of a chosen and a rejected answer, as samples. P pairs."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from tunesmith.data.fit import Cut
from tunesmith.data.render import Encoded, Renderer
from tunesmith.data.rows import Row
from tunesmith.nn.forks import Fork, ForkBatch, flatten_forks
from tunesmith.nn.language import LanguageModel
from tunesmith.train.objective import Ground
from tunesmith.train.source import Notes, encode, fits


@dataclass(frozen=True, slots=True)
class Pair:
    place: int
    fork: Fork
    """Its answers: the chosen one, the rejected one."""
    chosen_labels: int
    rejected_labels: int
    margin: float
    """How much better the chosen one is said to be; 0 where nothing is said."""

    @property
    def tokens(self) -> int:
        return self.fork.tokens

    @property
    def labels(self) -> int:
        return self.chosen_labels + self.rejected_labels


@dataclass(frozen=True)
class PairReader:
    """A row is a pair. What both answers follow is what they begin with alike, up to a label."""

    renderer: Renderer
    cut: Cut
    samples_a_row: int = 1

    def read(self, row: Row, place: int, notes: Notes) -> Pair | None:
        assert row.rejected is not None, "a file of pairs"
        found = [encode(self.renderer, one, notes) for one in (row, row.rejected)]
        answers = [one for one in found if one is not None]
        if len(answers) < len(found):
            return None
        longest = max(len(one.ids) for one in answers)
        if not fits(self.cut, longest, row.line, notes):
            return None
        return self._pair(row, place, [cut_short(one, self.cut) for one in answers], notes)

    def _pair(self, row: Row, place: int, answers: list[Encoded], notes: Notes) -> Pair | None:
        if answers[0].ids == answers[1].ids:
            notes.reasons.append("alike")
            return None
        chosen, rejected = (sum(one.mask[1:]) for one in answers)
        if not (chosen and rejected):
            notes.reasons.append("masked")
            return None
        return Pair(place, fork_of(answers), chosen, rejected, row.margin or 0.0)


def cut_short(encoded: Encoded, cut: Cut) -> Encoded:
    return Encoded(encoded.ids[: cut.max_length], encoded.mask[: cut.max_length])


def fork_of(answers: Sequence[Encoded]) -> Fork:
    """Parted where the first label of any is, or before, where they differ."""
    firsts = zip(*(one.ids[: one.mask.index(True)] for one in answers), strict=False)
    size = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, firsts))
    return Fork(
        prompt=array("i", answers[0].ids[:size]),
        answers=tuple((array("i", one.ids[size:]), one.mask[size:]) for one in answers),
    )


@dataclass(frozen=True)
class PairLogps:
    """Of each answer's labels, columns chosen and rejected."""

    sums_P2: Tensor
    counts_P2: Tensor
    rest: Tensor
    """The sum over the other tokens of the chosen sequences, where they were asked for."""

    @property
    def means_P2(self) -> Tensor:
        return self.sums_P2 / self.counts_P2


def pair_logps(
    ground: Ground[LanguageModel], pairs: Sequence[Pair], *, is_whole: bool = False
) -> PairLogps:
    batch = batch_of(ground, pairs, is_whole=is_whole)
    values_R = ground.model.log_probs(batch.flat)
    return PairLogps(
        batch.sums(values_R).view(-1, 2), batch.counts().view(-1, 2), batch.rest(values_R).sum()
    )


def batch_of(
    ground: Ground[LanguageModel], pairs: Sequence[Pair], *, is_whole: bool = False
) -> ForkBatch:
    return flatten_forks(
        [pair.fork for pair in pairs],
        ground.device,
        is_shared=ground.model.can_share_prompts,
        is_whole=is_whole,
    )


def places(samples: Sequence[Pair]) -> Tensor:
    return torch.tensor([one.place for one in samples], dtype=torch.int64)

"""Prompts with several answers each, as one row of tokens in which a prompt stands once.

T tokens, A label rows of answers, R label rows in all. An answer after the first sees the prompt
where it stands with the first, at the same positions: that is exact, and the prompt is worked out
once (see `attention.Segments.runs`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise, repeat

import torch
from torch import Tensor

from tunesmith.nn.attention import LONG
from tunesmith.nn.batch import FlatBatch, Sample


@dataclass(frozen=True)
class Fork:
    """A prompt, and answers that go on from it, each by itself: ids, and which are labels."""

    prompt: Sequence[int]
    answers: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(ids) for ids, _ in self.answers)

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(ids) for ids, _ in self.answers)


@dataclass(frozen=True)
class ForkBatch:
    flat: FlatBatch
    """Its first A label rows are those of answers, the others those that were asked for beside."""
    owners_A: Tensor
    """Which answer each belongs to, counted over all forks."""
    answers: int

    def sums(self, values_R: Tensor) -> Tensor:
        """Of each answer's label rows, (answers)."""
        owned_A = values_R[: self.owners_A.shape[0]]
        return owned_A.new_zeros(self.answers).index_add(0, self.owners_A, owned_A)

    def counts(self) -> Tensor:
        """Label rows of each answer, (answers), as floats."""
        return torch.bincount(self.owners_A, minlength=self.answers).float()

    def rest(self, values_R: Tensor) -> Tensor:
        return values_R[self.owners_A.shape[0] :]


def flatten_forks(
    forks: Sequence[Fork],
    device: str | torch.device = "cpu",
    *,
    is_shared: bool = True,
    is_whole: bool = False,
) -> ForkBatch:
    """Label rows of every answer; with `is_whole` those of each fork's first sequence beside.

    The latter are all tokens of the prompt and the first answer that are no labels of the answer,
    but for the very first, which nothing predicts.
    """
    layout = _Layout.of(forks, is_shared)
    own = [path.labels() for path in layout.paths]
    owners = [number for number, steps in enumerate(own) for _ in steps]
    rest = [path.others() for path in layout.paths if is_whole and path.is_first]
    flat = layout.batch(list(chain(*own, *rest)), device)
    return ForkBatch(flat, torch.tensor(owners, dtype=torch.int64).to(device), len(own))


def flatten_ends(
    forks: Sequence[Fork], device: str | torch.device = "cpu", *, is_shared: bool = True
) -> FlatBatch:
    """One row for each answer: its last token's, which has seen all of it. Targets mean nothing."""
    layout = _Layout.of(forks, is_shared)
    return layout.batch([(path.rows[-1], path.rows[-1]) for path in layout.paths], device)


Step = tuple[int, int]
"""Two rows: the state of the first predicts the token of the second."""


@dataclass(frozen=True)
class _Path:
    """The rows of a prompt and one answer, in the order they are read."""

    rows: list[int]
    mask: Sequence[bool]
    """Of the answer's tokens."""
    is_first: bool

    def labels(self) -> list[Step]:
        return [step for step, is_label in self._steps() if is_label]

    def others(self) -> list[Step]:
        return [step for step, is_label in self._steps() if not is_label]

    def _steps(self) -> Iterator[tuple[Step, bool]]:
        prompt = len(self.rows) - len(self.mask)
        marks = chain(repeat(False, prompt), self.mask)
        return zip(pairwise(self.rows), islice(marks, 1, None), strict=True)


@dataclass(frozen=True)
class _Layout:
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    key_bounds: list[int] = field(default_factory=lambda: [0])
    runs: list[tuple[int, int]] = field(default_factory=list)
    paths: list[_Path] = field(default_factory=list)

    @classmethod
    def of(cls, forks: Sequence[Fork], is_shared: bool) -> "_Layout":
        assert forks, "a batch needs a fork"
        layout = cls()
        for fork in forks:
            # The kernel for long segments needs a mask where they have fewer queries than tokens.
            layout._add(fork, is_shared and bool(fork.prompt) and fork.longest <= LONG)
        return layout

    def _add(self, fork: Fork, is_shared: bool) -> None:
        prompt = range(0)
        for number, (ids, mask) in enumerate(fork.answers):
            assert len(ids) == len(mask) > 0, "one mask entry for each id"
            if number == 0 or not is_shared:
                prompt = self._append(fork.prompt, 0)
                self._see(prompt.start, prompt.stop + len(ids))
            else:
                self._see(prompt.start, prompt.stop)
                self._see(len(self.ids), len(self.ids) + len(ids))
            answer = self._append(ids, len(prompt))
            self.bounds.append(len(self.ids))
            self.key_bounds.append(self.key_bounds[-1] + len(prompt) + len(ids))
            self.paths.append(_Path([*prompt, *answer], mask, number == 0))

    def _append(self, ids: Sequence[int], position: int) -> range:
        """Returns the rows that the tokens became."""
        rows = range(len(self.ids), len(self.ids) + len(ids))
        self.ids.extend(ids)
        self.positions.extend(range(position, position + len(ids)))
        return rows

    def _see(self, start: int, end: int) -> None:
        if self.runs and self.runs[-1][1] == start:
            start = self.runs.pop()[0]
        self.runs.append((start, end))

    def batch(self, steps: Sequence[Step], device: str | torch.device) -> FlatBatch:
        ids_T = torch.tensor(self.ids, dtype=torch.int64)
        rows_R, targets_R = torch.tensor(steps, dtype=torch.int64).view(-1, 2).unbind(1)
        is_plain = len(self.runs) == 1
        return FlatBatch(
            ids_T=ids_T.to(device),
            positions_T=torch.tensor(self.positions, dtype=torch.int64).to(device),
            bounds=tuple(self.bounds),
            rows_R=rows_R.contiguous().to(device),
            targets_R=ids_T[targets_R].to(device),
            key_bounds=None if is_plain else tuple(self.key_bounds),
            runs=None if is_plain else tuple(self.runs),
        )

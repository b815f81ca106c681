"""Several samples as one row of tokens, without padding. T tokens, R rows that predict a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from tunesmith.nn.attention import Runs, Segments

Sample = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and for each whether it is a label, that is, predicted from the one before it."""


@dataclass(frozen=True)
class FlatBatch:
    """`ids_T` and `positions_T` are int64; positions restart at 0 in each sample.

    `bounds` holds the samples' starts and the end: (0, 12, 40) is a sample of 12 and one of 28.
    The hidden state of row `rows_R[r]` predicts `targets_R[r]`; only labels are there.
    Where a sample goes on from tokens that stand in another, `runs` and `key_bounds` say what it
    sees: see `Segments`.
    """

    ids_T: Tensor
    positions_T: Tensor
    bounds: tuple[int, ...]
    rows_R: Tensor
    targets_R: Tensor
    key_bounds: tuple[int, ...] | None = None
    runs: Runs | None = None
    kept: list[tuple[Tensor, Tensor]] | None = None
    """Where given, the layers' keys and values are put there: see `Segments`."""

    @property
    def segments(self) -> Segments:
        if self.runs is None or self.key_bounds is None:
            return Segments(self.bounds, kept=self.kept)
        return Segments(self.key_bounds, self.bounds, self.runs, self.kept)

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def labels(self) -> int:
        """How many losses the sum has."""
        return int(self.rows_R.shape[0])


def flatten(samples: Sequence[Sample], device: str | torch.device = "cpu") -> FlatBatch:
    """Join samples to one row. A sample's first token is never a label: nothing predicts it."""
    assert samples, "a batch needs a sample"
    assert all(len(ids) == len(mask) > 0 for ids, mask in samples), "one mask entry for each id"
    lengths = [len(ids) for ids, _ in samples]
    bounds = tuple(accumulate(lengths, initial=0))
    ids_T = torch.tensor(list(chain.from_iterable(ids for ids, _ in samples)), dtype=torch.int64)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    is_label_T = torch.tensor(list(chain.from_iterable(mask for _, mask in samples)))
    is_label_T = is_label_T.bool() & (positions_T > 0)
    places_R = is_label_T.nonzero()[:, 0]
    return FlatBatch(
        ids_T=ids_T.to(device),
        positions_T=positions_T.to(device),
        bounds=bounds,
        rows_R=(places_R - 1).to(device),
        targets_R=ids_T[places_R].to(device),
    )

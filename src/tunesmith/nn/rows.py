"""Which rows the last layer has to work out: only a label's row is ever read after it.

Keys and values are needed of every token, but queries, and all that follows them, only from a
segment's first label row on. That is exact: the rows left out reach no loss.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tunesmith.nn.attention import LONG, Bounds
from tunesmith.nn.batch import FlatBatch


@dataclass(frozen=True)
class LastRows:
    """K rows kept of T: each segment's from its first label row to its end.

    A long segment is kept whole: the kernel for those needs a mask where queries are left out.
    """

    kept_K: Tensor
    bounds: Bounds
    """Where each segment's kept rows lie among them."""
    labels_R: Tensor
    """The label rows' places among the kept."""


def last_rows(batch: FlatBatch, step: int = 1) -> LastRows:
    """The rows kept are rounded up to a multiple of `step`."""
    starts = torch.tensor(batch.bounds[:-1], device=batch.rows_R.device)
    ends = torch.tensor(batch.bounds[1:], device=batch.rows_R.device)
    segment_R = torch.searchsorted(ends, batch.rows_R, right=True)
    first = ends.scatter_reduce(0, segment_R, batch.rows_R, "amin")
    first = torch.where((ends - starts > LONG) & (first < ends), starts, first)
    lengths = (ends - first).tolist()
    bounds = tuple(accumulate(lengths, initial=0))
    shift = torch.tensor(bounds[:-1], device=first.device) - first
    kept = [
        torch.arange(end - length, end)
        for end, length in zip(batch.bounds[1:], lengths, strict=True)
    ]
    spare = -bounds[-1] % step
    kept_K = torch.cat([*kept, torch.zeros(spare, dtype=torch.int64)]).to(batch.rows_R.device)
    return LastRows(kept_K, bounds, batch.rows_R + shift[segment_R])

"""Which rows the last layer has to work out: only a label's row is ever read after it.

Keys and values are needed of every token, but queries, and all that follows them, only from a
segment's first label row on. That is exact: the rows left out reach no loss.
"""

from dataclasses import dataclass

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
    """`batch.rows_R` has to ascend. The rows kept are rounded up to a multiple of `step`."""
    starts = torch.tensor(batch.bounds[:-1], device=batch.rows_R.device)
    ends = torch.tensor(batch.bounds[1:], device=batch.rows_R.device)
    before = torch.searchsorted(batch.rows_R, starts)
    labels = torch.searchsorted(batch.rows_R, ends) - before
    with_end = torch.cat([batch.rows_R, ends[-1:]])
    first = torch.where(ends - starts > LONG, starts, with_end[before])
    first = torch.where(labels > 0, first, ends)
    lengths = (ends - first).tolist()
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    shift = torch.tensor(bounds[:-1], device=first.device) - first
    kept = [
        torch.arange(end - length, end)
        for end, length in zip(batch.bounds[1:], lengths, strict=True)
    ]
    spare = -bounds[-1] % step
    kept_K = torch.cat([*kept, torch.zeros(spare, dtype=torch.int64)]).to(batch.rows_R.device)
    return LastRows(kept_K, tuple(bounds), batch.rows_R + shift.repeat_interleave(labels))

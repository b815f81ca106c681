"""One id drawn from each row, in few passes over the vocabulary.

B rows, V vocabulary entries, W likeliest entries of a row, N blocks of S entries. Wishes are
columns of float64: temperature, top-k, top-p, min-p, and the row's random number from [0, 1).

A row's id hangs on its own logits and wishes alone: how wide its neighbours are is no matter.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tunesmith.infer.draw import Draw

_WIDTHS = (128, 2048)
"""Entries that are sorted at first, and those of rows for which they were too few."""
_BLOCK = 128


def choose(logits_BV: Tensor, draws: Many[Draw]) -> list[int]:
    """Temperature, then top-k, top-p and min-p, as in transformers."""
    V = logits_BV.shape[-1]
    asked = [each.sampling for each in draws]
    columns = [
        (max(each.temperature, 1e-5), each.top_k or V, each.top_p, each.min_p, draw.uniform())
        for each, draw in zip(asked, draws, strict=True)
    ]
    wishes_B5 = torch.tensor(columns, dtype=torch.float64, device=logits_BV.device)
    ids = [0] * len(asked)
    is_narrow = [0 < each.top_k < V or each.top_p < 1 for each in asked]
    for kind, drawn in ((False, _draw_wide), (True, _draw_narrow)):
        rows = [i for i, each in enumerate(is_narrow) if each is kind]
        if rows:
            for i, id_ in zip(rows, drawn(*_of(rows, logits_BV, wishes_B5)), strict=True):
                ids[i] = id_
    return ids


def _draw_wide(logits_BV: Tensor, wishes_B5: Tensor) -> list[int]:
    """Rows of which all, or all that min-p leaves, may be drawn: the number is looked up in the
    sums of blocks, then within its block."""
    B, V = logits_BV.shape
    temperature_B1, _, _, min_p_B1, uniform_B1 = wishes_B5.T[:, :, None]
    N = -(-V // _BLOCK)
    weights_BV = logits_BV.new_empty(B, N * _BLOCK)
    weights_BV[:, V:] = 0
    weights_BV[:, :V] = _weights(logits_BV, temperature_B1)
    if bool((min_p_B1 > 0).any()):
        weights_BV.masked_fill_(weights_BV < min_p_B1, 0)
    weights_BNS = weights_BV.view(B, N, _BLOCK)
    sums_BN = weights_BNS.sum(dim=-1).double()
    edges_BN = sums_BN.cumsum(dim=-1)
    aims_B1 = uniform_B1 * edges_BN[:, -1:]
    at_B1 = _look_up(aims_B1, edges_BN, sums_BN)
    left_B1 = aims_B1 - (edges_BN - sums_BN).gather(-1, at_B1)
    block_BS = weights_BNS.gather(1, at_B1[:, :, None].expand(B, 1, _BLOCK))[:, 0].double()
    inner_B1 = _look_up(left_B1, block_BS.cumsum(dim=-1), block_BS)
    ids: list[int] = (at_B1 * _BLOCK + inner_B1)[:, 0].tolist()
    return ids


def _draw_narrow(logits_BV: Tensor, wishes_B5: Tensor) -> list[int]:
    """Rows of which top-k or top-p leave few: those alone are sorted, and more where they were too
    few to reach top-p."""
    B, V = logits_BV.shape
    least = [0 if k >= V else int(k) for k in wishes_B5[:, 1].tolist()]
    mass_B1 = wishes_B5[:, :1]
    if 0 in least:
        mass_B1 = _weights(logits_BV, wishes_B5[:, :1]).sum(-1, True, dtype=torch.float64)
    ids, left = [0] * B, set(range(B))
    for width in sorted({*(min(each, V) for each in _WIDTHS), V}):
        rows = [i for i in sorted(left) if least[i] <= width]
        if rows:
            part_BV, part_B5, part_B1 = _of(rows, logits_BV, wishes_B5, mass_B1)
            found, is_short = _draw_sorted(part_BV, part_B5, part_B1, width)
            for i, id_, short in zip(rows, found, is_short, strict=True):
                ids[i] = id_
                left -= set() if short else {i}
    return ids


def _draw_sorted(
    logits_BV: Tensor, wishes_B5: Tensor, mass_B1: Tensor, width: int
) -> tuple[list[int], list[bool]]:
    """The ids, and of which rows the likeliest `width` were too few. `mass_B1`: a whole row's
    weight, where it has no top-k."""
    V = logits_BV.shape[-1]
    temperature_B1, top_k_B1, top_p_B1, min_p_B1, uniform_B1 = wishes_B5.T[:, :, None]
    best_BW, ids_BW = _likeliest(logits_BV, width)
    places_W = torch.arange(width, device=logits_BV.device)
    weights_BW = _weights(best_BW, temperature_B1).double()
    weights_BW.masked_fill_(places_W >= top_k_B1, 0)
    edges_BW = weights_BW.cumsum(dim=-1)
    goal_B1 = top_p_B1 * torch.where(top_k_B1 < V, edges_BW[:, -1:], mass_B1)
    is_short_B1 = (edges_BW[:, -1:] < goal_B1) & (top_k_B1 >= V) & (width < V)
    is_dropped_BW = (edges_BW - weights_BW >= goal_B1) & (top_p_B1 < 1) & (places_W > 0)
    weights_BW.masked_fill_(is_dropped_BW | (weights_BW < min_p_B1), 0)
    edges_BW = weights_BW.cumsum(dim=-1)
    at_B1 = _look_up(uniform_B1 * edges_BW[:, -1:], edges_BW, weights_BW)
    ids: list[int] = ids_BW.gather(-1, at_B1)[:, 0].tolist()
    return ids, is_short_B1[:, 0].tolist()


def _likeliest(logits_BV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row and their ids, of equal ones the lower id first: logits of
    16 bits have many equals, and how `topk` orders them hangs on the batch."""
    found_BW, ids_BW = logits_BV.topk(width, dim=-1, sorted=False)
    ids_BW, order_BW = ids_BW.sort(dim=-1)
    found_BW, after_BW = found_BW.gather(-1, order_BW).sort(dim=-1, descending=True, stable=True)
    return found_BW, ids_BW.gather(-1, after_BW)


def _weights(logits_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """In proportion to the probabilities; the likeliest has 1, whatever the temperature."""
    shifted_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    return shifted_BV.div_(temperature_B1.to(logits_BV.dtype)).exp_()


def _look_up(aims_B1: Tensor, edges_BW: Tensor, weights_BW: Tensor) -> Tensor:
    """The first place (B, 1) whose edge is beyond the aim; the last that weighs anything where
    rounding leaves none."""
    at_B1 = torch.searchsorted(edges_BW, aims_B1, right=True)
    W = edges_BW.shape[-1]
    places_W = torch.arange(W, device=edges_BW.device)
    last_B1 = torch.where(weights_BW > 0, places_W, 0).amax(dim=-1, keepdim=True)
    return torch.minimum(at_B1, last_B1)


def _of(rows: list[int], *parts: Tensor) -> tuple[Tensor, ...]:
    """These rows of each; all of them are not copied."""
    return parts if len(rows) == len(parts[0]) else tuple(each[rows] for each in parts)

"""From logits to the next token id. B sequences, V vocabulary entries, N ids of one sequence."""

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.spec.chat import Sampling


@dataclass(frozen=True, slots=True)
class Draw:
    """What sampling one row needs to know of its sequence."""

    sampling: Sampling
    prompt: Many[int]
    generated: Many[int]
    uniform: float
    """From [0, 1): the sequence's own next random number; unused where it is greedy."""


def sample(logits_BV: Tensor, draws: Many[Draw]) -> list[int]:
    """Pick the next id of each row. The logits are overwritten where a row has penalties."""
    for row_V, draw in zip(logits_BV, draws, strict=True):
        penalise(row_V, draw)
    ids = logits_BV.argmax(dim=-1).tolist()
    drawn = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if drawn:
        weights_BV = shape([draws[i].sampling for i in drawn], logits_BV[drawn].float())
        for i, weights_V in zip(drawn, weights_BV, strict=True):
            ids[i] = pick(weights_V, draws[i].uniform)
    return [int(id_) for id_ in ids]


def penalise(logits_V: Tensor, draw: Draw) -> None:
    """Apply the penalties that `draw` asks for to one row, in place."""
    asked = draw.sampling
    if asked.repetition_penalty != 1:
        seen_N = _unique([*draw.prompt, *draw.generated], logits_V.device)
        logits_V[seen_N] = weaken_seen(logits_V[seen_N], asked.repetition_penalty)
    if (asked.presence_penalty or asked.frequency_penalty) and draw.generated:
        counts = Counter(draw.generated)
        ids_N = torch.tensor(list(counts), device=logits_V.device)
        counts_N = torch.tensor(list(counts.values()), device=logits_V.device)
        logits_V[ids_N] -= asked.presence_penalty + asked.frequency_penalty * counts_N


def weaken_seen(logits_N: Tensor, penalty: float) -> Tensor:
    """Divide positive logits by `penalty`, multiply negative ones by it.

    Expects the logits of every token of prompt and continuation, each once.
    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with the sign handled as
    `transformers` does. Presence and frequency penalties: OpenAI's API reference, "Frequency and
    presence penalties"; they count the continuation only.
    """
    return torch.where(logits_N > 0, logits_N / penalty, logits_N * penalty)


def shape(samplings: Many[Sampling], logits_BV: Tensor) -> Tensor:
    """Temperature, then top-k, then top-p. Returns (B, V) probabilities; rows sum to 1."""
    columns = [(each.temperature, each.top_k, each.top_p) for each in samplings]
    temperature_B1, top_k_B1, top_p_B1 = torch.tensor(
        columns, dtype=torch.float64, device=logits_BV.device
    ).T.unsqueeze(-1)
    # The largest becomes 0 first, so that a tiny temperature overflows to -inf and not to nan.
    logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    logits_BV = logits_BV / temperature_B1.clamp(min=1e-5).to(logits_BV.dtype)
    if any(0 < k < logits_BV.shape[-1] for _, k, _ in columns):
        logits_BV = keep_top_k(logits_BV, top_k_B1.squeeze(-1).long())
    if any(p < 1 for _, _, p in columns):
        logits_BV = keep_top_p(logits_BV, top_p_B1.squeeze(-1))
    return logits_BV.softmax(dim=-1)


def keep_top_k(logits_BV: Tensor, top_k_B: Tensor) -> Tensor:
    """Drop all but the k likeliest tokens of each row; ties with the last one stay.

    0, or a k beyond the vocabulary, keeps the row whole.
    Returns (B, V) logits with -inf where dropped; the input is left alone.
    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    V = logits_BV.shape[-1]
    k_B = torch.where(top_k_B <= 0, V, top_k_B).clamp(max=V)
    largest_BK = logits_BV.topk(int(k_B.max()), dim=-1).values
    floor_B1 = largest_BK.gather(-1, (k_B - 1)[:, None])
    return logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Drop the unlikely tail: keep the fewest tokens whose probability reaches top_p.

    The likeliest token always stays; ties go to the lower id. Expects 0 < top_p <= 1, and logits
    already divided by temperature. A top_p of 1 keeps the row whole.
    Returns (B, V) logits with -inf where dropped; the input is left alone.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.double().softmax(dim=-1)
    ahead_BV = probs_BV.cumsum(dim=-1) - probs_BV
    is_dropped_BV = (ahead_BV >= top_p_B[:, None]) & (top_p_B < 1)[:, None]
    is_dropped_BV[:, 0] = False
    kept_BV = sorted_BV.masked_fill(is_dropped_BV, -torch.inf)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, kept_BV)


def pick(weights_V: Tensor, uniform: float) -> int:
    """Draw one id by inverting the distribution function at `uniform`, from [0, 1).

    One number a token, whatever the vocabulary: so the n-th token of a sequence depends on its
    seed and its own logits alone. An id of weight 0 is never drawn.
    """
    edges_V = weights_V.double().cumsum(dim=-1)
    at = int(torch.searchsorted(edges_V, uniform * edges_V[-1], right=True))
    return min(at, int(weights_V.nonzero()[-1]))


def _unique(ids: Many[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(set(ids)), dtype=torch.long, device=device)

"""From logits to the next token id. B sequences, V vocabulary entries, N ids of one sequence."""

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.nn.sampling import keep_top_k, keep_top_p, pick, tempered
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
        uniform_B = torch.tensor([draws[i].uniform for i in drawn], dtype=torch.float64)
        for i, id_ in zip(drawn, pick(weights_BV, uniform_B.to(weights_BV.device)), strict=True):
            ids[i] = int(id_)
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
    logits_BV = tempered(logits_BV, temperature_B1)
    if any(0 < k < logits_BV.shape[-1] for _, k, _ in columns):
        logits_BV = keep_top_k(logits_BV, top_k_B1.squeeze(-1).long())
    if any(p < 1 for _, _, p in columns):
        logits_BV = keep_top_p(logits_BV, top_p_B1.squeeze(-1))
    return logits_BV.softmax(dim=-1)


def _unique(ids: Many[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(set(ids)), dtype=torch.long, device=device)

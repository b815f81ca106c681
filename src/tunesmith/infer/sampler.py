"""From logits to the next token id. B sequences, V vocabulary entries, N edited logits.

The order is that of transformers: repetition penalty, then what is added (logit bias, presence
and frequency penalties), a grammar, temperature, top-k, top-p, min-p. Log-probabilities are the
model's own, before any of it.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import ServerError, TuningAPIError
from tunesmith.infer.chance import choose
from tunesmith.infer.draw import Amounts, Draw, Ids


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model found a token, and the likeliest ones in its place, likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Pick:
    """A row's next token."""

    id: int | None
    score: Score | None = None
    is_last: bool = False
    """Nothing can follow: a grammar is at its end."""
    error: TuningAPIError | None = None
    """Why there is no id, or none after it."""


def sample(logits_BV: Tensor, draws: Many[Draw]) -> list[Pick]:
    """Pick the next id of each row; the logits are left alone.

    Where nothing but the likeliest is asked for, that is one pass over the batch.
    """
    ids = likeliest(logits_BV)
    special = [i for i, draw in enumerate(draws) if ids[i] is not None and not draw.is_plain]
    if special:
        part_BV = logits_BV if len(special) == len(draws) else logits_BV[special]
        chosen = _choose(part_BV.float(), [draws[i] for i in special])
        for i, id_ in zip(special, chosen, strict=True):
            ids[i] = id_
    scores = _scores(logits_BV, ids, draws)
    return [
        _told(draw, id_, scores.get(i))
        for i, (draw, id_) in enumerate(zip(draws, ids, strict=True))
    ]


def _told(draw: Draw, id_: int | None, score: Score | None) -> Pick:
    if id_ is None:
        return Pick(None, error=ServerError("the model's output is not a number (broken weights?)"))
    draw.push(id_)
    guide = draw.guide
    if guide is None:
        return Pick(id_, score)
    return Pick(id_, score, guide.is_over, guide.error)


def likeliest(logits_BV: Tensor) -> list[int | None]:
    """Each row's likeliest id, None where its logits are not numbers."""
    best = logits_BV.max(dim=-1)
    is_sound_B = best.values.isfinite()
    return [
        id_ if is_sound else None
        for id_, is_sound in zip(best.indices.tolist(), is_sound_B.tolist(), strict=True)
    ]


def _scores(logits_BV: Tensor, ids: Many[int | None], draws: Many[Draw]) -> dict[int, Score]:
    """By their rows, of those who ask for log-probabilities."""
    tops = [
        None if id_ is None else draw.sampling.top_logprobs
        for id_, draw in zip(ids, draws, strict=True)
    ]
    wanted = {i: top for i, top in enumerate(tops) if top is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    found = score(logits_BV[rows], [ids[i] or 0 for i in rows], list(wanted.values()))
    return dict(zip(rows, found, strict=True))


def _choose(logits_BV: Tensor, draws: Many[Draw]) -> list[int]:
    """The ids of rows that ask for more than the likeliest."""
    logits_BV = constrain(edit(logits_BV, draws), draws)
    drawn = [i for i, draw in enumerate(draws) if not draw.is_greedy]
    if len(drawn) == len(draws):
        return choose(logits_BV, draws)
    ids = [int(id_) for id_ in logits_BV.argmax(dim=-1).tolist()]
    if drawn:
        for i, id_ in zip(drawn, choose(logits_BV[drawn], [draws[i] for i in drawn]), strict=True):
            ids[i] = id_
    return ids


def edit(logits_BV: Tensor, draws: Many[Draw]) -> Tensor:
    """Penalties, biases and bans of the rows that ask for them, all at once. Returns a copy, or
    the logits themselves where none does."""
    seen = [(i, ids) for i, draw in enumerate(draws) if (ids := draw.seen) is not None]
    added = [(i, *columns) for i, draw in enumerate(draws) for columns in draw.additions()]
    if seen or added:
        logits_BV = logits_BV.clone()
    if seen:
        penalties: list[Amounts] = [
            np.full(len(ids), draws[i].sampling.repetition_penalty, np.float32) for i, ids in seen
        ]
        at = _places(seen, logits_BV.device)
        logits_BV[at] = weaken_seen(logits_BV[at], _tensor(penalties, logits_BV))
    if added:
        at = _places([(i, ids) for i, ids, _ in added], logits_BV.device)
        amounts_N = _tensor([amounts for _, _, amounts in added], logits_BV)
        logits_BV.index_put_(at, amounts_N, accumulate=True)
    return logits_BV


def constrain(logits_BV: Tensor, draws: Many[Draw]) -> Tensor:
    """Leave to the rows that follow a grammar the tokens it allows. Returns a copy, or the logits
    themselves where none does."""
    guided = [(i, draw.guide) for i, draw in enumerate(draws) if draw.guide is not None]
    if not guided:
        return logits_BV
    rows = [i for i, _ in guided]
    allowed_BV = torch.from_numpy(np.stack([guide.mask() for _, guide in guided]))
    is_banned_BV = ~allowed_BV.to(logits_BV.device)
    logits_BV = logits_BV.clone()
    logits_BV[rows] = logits_BV[rows].masked_fill(is_banned_BV, -torch.inf)
    return logits_BV


def weaken_seen(logits_N: Tensor, penalty: float | Tensor) -> Tensor:
    """Divide positive logits by `penalty`, multiply negative ones by it.

    Expects the logits of every token of prompt and continuation, each once.
    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with the sign handled as
    `transformers` does. Presence and frequency penalties: OpenAI's API reference, "Frequency and
    presence penalties"; they count the continuation only.
    """
    return torch.where(logits_N > 0, logits_N / penalty, logits_N * penalty)


def score(logits_BV: Tensor, ids: Many[int], tops: Many[int]) -> list[Score]:
    """What the model gave to each row's id, and each row's `tops` likeliest."""
    logits_BV = logits_BV.float()
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    own_B1 = torch.tensor(ids, device=logits_BV.device)[:, None]
    own = (logits_BV.gather(-1, own_B1) - total_B1)[:, 0].tolist()
    most = min(max(tops, default=0), logits_BV.shape[-1])
    best = logits_BV.topk(most, dim=-1)
    best_ids, best_logprobs = best.indices.tolist(), (best.values - total_B1).tolist()
    return [
        Score(own[i], tuple(zip(best_ids[i][:top], best_logprobs[i][:top], strict=True)))
        for i, top in enumerate(tops)
    ]


def _places(found: Many[tuple[int, Ids]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = np.repeat([i for i, _ in found], [len(ids) for _, ids in found])
    ids = np.concatenate([ids for _, ids in found])
    return torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)


def _tensor(parts: Many[Amounts], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(like)

"""Causal attention inside each segment of a flat row, and never across.

T tokens, Q of them as queries, H query heads, K key and value heads (H a multiple of K), D their
size.
Within a segment: L queries, the last ones of its S tokens.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.nn import varlen
from tunesmith.nn.matmul import SHAPE_STEP, is_exact, is_onednn, product

Bounds = tuple[int, ...]
"""Segment starts and the end: (0, 12, 40)."""
Runs = tuple[tuple[int, int], ...]
"""Rows, from one to before another, run after run."""

_SHORT = 112
"""Tokens up to which a segment's heads are multiplied in one batched product."""
LONG = 1024
"""Tokens up to which the attention shares (H, L, S) are kept for the gradient."""
_BLOCK = 512
"""Queries at once, in a long segment whose tokens see a window only."""


@dataclass(frozen=True)
class AttentionRule:
    """What an architecture adds to plain causal attention."""

    scale: float
    """Scores are multiplied by it."""
    window: int | None = None
    """A token sees itself and the window - 1 before it; None sees all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    dropout: float = 0.0


@dataclass(frozen=True)
class Segments:
    """Which rows of a flat row belong together."""

    bounds: Bounds
    """Segment i sees its tokens bounds[i] to bounds[i + 1]."""
    query_bounds: Bounds | None = None
    """Where given, segment i has only its last few tokens as queries, in rows query_bounds[i] to
    query_bounds[i + 1] of the queries."""
    runs: Runs | None = None
    """Where given, the rows of keys and values that the tokens are, in their order; a row can be
    a token of several segments, as a prompt is that two answers go on from."""
    kept: list[tuple[Tensor, Tensor]] | None = None
    """Where given, each layer's keys and values (K, T, D) are put there, layer after layer."""

    @property
    def queries(self) -> Bounds:
        return self.query_bounds or self.bounds


class Looking(Protocol):
    """Anything else that rows can look at, such as tokens that went through before."""

    def attend(
        self, q_HQD: Tensor, k_KQD: Tensor, v_KQD: Tensor, rule: AttentionRule
    ) -> Tensor: ...


def attend(
    q_HQD: Tensor, k_KTD: Tensor, v_KTD: Tensor, segments: Segments | Looking, rule: AttentionRule
) -> Tensor:
    """Returns (Q, H, D).

    Rows after the last segment are spare: nothing is read from them, and what comes out there is 0.
    """
    if not isinstance(segments, Segments):
        return segments.attend(q_HQD, k_KTD, v_KTD, rule)
    if segments.kept is not None:
        segments.kept.append((k_KTD, v_KTD))
    if _is_plain(q_HQD, v_KTD, rule):
        out: Tensor = _Attend.apply(q_HQD, k_KTD, v_KTD, segments, rule)  # type: ignore[no-untyped-call]
        return out
    bounds, query_bounds = segments.bounds, segments.queries
    if segments.runs is not None:
        k_KTD, v_KTD = (_Spread.apply(x, segments.runs) for x in (k_KTD, v_KTD))  # type: ignore[no-untyped-call]
    has_extras = rule.softcap is not None or rule.dropout > 0
    if not has_extras and varlen.is_served(q_HQD, v_KTD):
        out_QHD = varlen.attend_varlen(
            q_HQD, k_KTD, v_KTD, bounds, query_bounds, rule.scale, rule.window
        )
        return F.pad(out_QHD, (0, 0, 0, 0, 0, q_HQD.shape[1] - query_bounds[-1]))
    groups = q_HQD.shape[0] // k_KTD.shape[0]
    k_HTD, v_HTD = (x.repeat_interleave(groups, 0) if groups > 1 else x for x in (k_KTD, v_KTD))
    parts = [
        _attend_one(q_HQD[:, c:d], k_HTD[:, a:b], v_HTD[:, a:b], rule)
        for (a, b), (c, d) in zip(pairwise(bounds), pairwise(query_bounds), strict=True)
    ]
    spare = q_HQD.shape[1] - query_bounds[-1]
    return F.pad(torch.cat(parts, 1), (0, 0, 0, spare)).transpose(0, 1)


def _is_plain(q_HQD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> bool:
    """Whether `_Attend` computes it."""
    has_extras = rule.softcap is not None or rule.dropout > 0
    return is_exact(q_HQD) and not has_extras and v_KTD.shape[-1] == q_HQD.shape[-1]


def _attend_one(q_HLD: Tensor, k_HSD: Tensor, v_HSD: Tensor, rule: AttentionRule) -> Tensor:
    """By torch's own kernels and gradients."""
    queries, tokens = q_HLD.shape[1], k_HSD.shape[1]
    if rule.softcap is not None:
        return _attend_capped(q_HLD, k_HSD, v_HSD, rule)
    is_banded = rule.window is not None and rule.window < tokens
    has_mask = is_banded or queries != tokens
    mask_LS = _may_see(queries, tokens, rule.window, q_HLD.device) if has_mask else None
    out_1HLD = F.scaled_dot_product_attention(
        q_HLD[None],
        k_HSD[None],
        v_HSD[None],
        attn_mask=mask_LS,
        is_causal=mask_LS is None,
        scale=rule.scale,
        dropout_p=rule.dropout,
    )
    return out_1HLD[0]


def _attend_capped(q_HLD: Tensor, k_HSD: Tensor, v_HSD: Tensor, rule: AttentionRule) -> Tensor:
    """Gemma 2's capped scores (arXiv:2408.00118, section 2); no fused kernel knows them."""
    assert rule.softcap is not None
    scores_HLS = (q_HLD @ k_HSD.transpose(1, 2)).float() * rule.scale
    scores_HLS = rule.softcap * torch.tanh(scores_HLS / rule.softcap)
    may_see_LS = _may_see(q_HLD.shape[1], k_HSD.shape[1], rule.window, q_HLD.device)
    shares_HLS = scores_HLS.masked_fill(~may_see_LS, -torch.inf).softmax(-1).to(v_HSD.dtype)
    return F.dropout(shares_HLS, rule.dropout) @ v_HSD


def _may_see(queries: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """(L, S) bool: which tokens a segment's last `queries` tokens see."""
    last = tokens - queries
    all_LS = torch.ones(queries, tokens, dtype=torch.bool, device=device).tril_(last)
    return all_LS if window is None else all_LS.triu_(last + 1 - window)


@functools.lru_cache(maxsize=8)
def _penalty(size: int, window: int | None) -> Tensor:
    """(size, size): 0 where the row sees the column, else minus infinity."""
    may_see = _may_see(size, size, window, torch.device("cpu"))
    return torch.zeros(size, size).masked_fill_(~may_see, -torch.inf)


@dataclass(frozen=True)
class _Place:
    """Where a segment's queries and tokens lie, and how far its slices reach.

    Slices may reach beyond the segment, into rows of the next one, so that few shapes occur:
    no query of the segment sees those columns, and the rows of those queries are emptied.
    """

    query: int
    queries: int
    token: int
    tokens: int
    reach_queries: int
    reach_tokens: int
    is_rounded: bool

    @property
    def q(self) -> slice:
        return slice(self.query, self.query + self.reach_queries)

    @property
    def kv(self) -> slice:
        return slice(self.token, self.token + self.reach_tokens)


def _places(
    bounds: Bounds, query_bounds: Bounds, window: int | None, is_by_head: bool
) -> list[_Place]:
    places = []
    for tokens, queries in zip(pairwise(bounds), pairwise(query_bounds), strict=True):
        for (a, b), (c, d) in _blocks(tokens, queries, window):
            is_rounded = is_by_head and _SHORT < b - a <= LONG
            step = 1 if not is_rounded else SHAPE_STEP if d - c == b - a else 2 * SHAPE_STEP
            reach = (-(-(d - c) // step) * step, -(-(b - a) // step) * step)
            places.append(_Place(c, d - c, a, b - a, *reach, is_rounded))
    return places


def _blocks(
    tokens: tuple[int, int], queries: tuple[int, int], window: int | None
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """A segment as it is, or, where it is long, blocks of queries with the tokens they can see."""
    (first, last), (start, end) = tokens, queries
    if window is None or last - first <= LONG:
        if end > start:
            yield tokens, queries
        return
    for block in range(start, end, _BLOCK):
        block_end = min(end, block + _BLOCK)
        seen = last - (end - block_end)
        yield (max(first, seen - (block_end - block) - window + 1), seen), (block, block_end)


_ROOM = 2 * SHAPE_STEP
"""Zero rows after the last token, so that the last segment's slices can reach beyond it."""


def _with_room(x_HTD: Tensor, scale: float = 1.0, runs: Runs | None = None) -> Tensor:
    """A contiguous copy of all rows, or of `runs`, times `scale`, with room after it."""
    heads, tokens, size = x_HTD.shape
    runs = runs or ((0, tokens),)
    total = sum(end - start for start, end in runs)
    out = x_HTD.new_empty(heads, total + _ROOM, size)
    out[:, total:] = 0
    for place, (start, end) in zip(_starts(runs), runs, strict=True):
        torch.mul(x_HTD[:, start:end], scale, out=out[:, place : place + end - start])
    return out


def _starts(runs: Runs) -> Iterator[int]:
    return accumulate((end - start for start, end in runs[:-1]), initial=0)


def _folded(x_HSD: Tensor, runs: Runs, tokens: int) -> Tensor:
    """The adjoint of laying out `runs`: each of T rows gets the sum of what it became."""
    out_HTD = x_HSD.new_zeros(x_HSD.shape[0], tokens, x_HSD.shape[2])
    for place, (start, end) in zip(_starts(runs), runs, strict=True):
        out_HTD[:, start:end] += x_HSD[:, place : place + end - start]
    return out_HTD


class _Spread(torch.autograd.Function):
    """Rows laid out run after run, for torch's own kernels."""

    @staticmethod
    def forward(ctx: Any, x_HTD: Tensor, runs: Runs) -> Tensor:
        ctx.runs, ctx.tokens = runs, x_HTD.shape[1]
        return torch.cat([x_HTD[:, start:end] for start, end in runs], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HSD: Tensor) -> tuple[Tensor, None]:
        return _folded(grad_HSD, ctx.runs, ctx.tokens), None


class _Attend(torch.autograd.Function):
    """On a CPU in fp32, each segment in the way that suits its length."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HQD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        segments: Segments,
        rule: AttentionRule,
    ) -> Tensor:
        ctx.runs, ctx.tokens = segments.runs, k_KTD.shape[1]
        q_HQD = _with_room(q_HQD, rule.scale)
        k_KTD, v_KTD = (_with_room(x, runs=segments.runs) for x in (k_KTD, v_KTD))
        out_QHD = q_HQD.new_zeros(q_HQD.shape[1] - _ROOM, q_HQD.shape[0], q_HQD.shape[2])
        ctx.places = _places(segments.bounds, segments.queries, rule.window, is_onednn(q_HQD))
        kept: list[Tensor] = []
        ctx.kept_up_to = []
        for place in ctx.places:
            cut = _Cut(q_HQD[:, place.q], k_KTD[:, place.kv], v_KTD[:, place.kv])
            out_HLD, saved = _way(place).forward(cut, place, rule.window)
            kept += saved
            ctx.kept_up_to.append(len(kept))
            rows = slice(place.query, place.query + place.queries)
            out_QHD[rows] = out_HLD[:, : place.queries].transpose(0, 1)
        ctx.window, ctx.scale = rule.window, rule.scale
        ctx.save_for_backward(q_HQD, k_KTD, v_KTD, *kept)
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHD: Tensor) -> tuple[Tensor | None, ...]:
        q_HQD, k_KTD, v_KTD, *kept = ctx.saved_tensors
        grad_HQD = _with_room(grad_QHD.transpose(0, 1))
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_HQD, k_KTD, v_KTD))
        for place, start, end in zip(
            ctx.places, [0, *ctx.kept_up_to[:-1]], ctx.kept_up_to, strict=True
        ):
            cut = _Cut(q_HQD[:, place.q], k_KTD[:, place.kv], v_KTD[:, place.kv])
            out = _Cut(grad_q[:, place.q], grad_k[:, place.kv], grad_v[:, place.kv])
            grad_HLD = grad_HQD[:, place.q]
            _way(place).backward(grad_HLD, cut, kept[start:end], place, ctx.window, out)
        grad_k, grad_v = (
            x[:, :-_ROOM] if ctx.runs is None else _folded(x, ctx.runs, ctx.tokens)
            for x in (grad_k, grad_v)
        )
        return grad_q[:, :-_ROOM].mul_(ctx.scale), grad_k, grad_v, None, None


@dataclass(frozen=True)
class _Cut:
    """A segment's rows of queries (already scaled), keys and values, or of their gradients."""

    q_HLD: Tensor
    k_KSD: Tensor
    v_KSD: Tensor

    @property
    def groups(self) -> int:
        return self.q_HLD.shape[0] // self.k_KSD.shape[0]

    def spread(self) -> tuple[Tensor, Tensor]:
        """Keys and values, one for each query head."""
        if self.groups == 1:
            return self.k_KSD, self.v_KSD
        return (
            self.k_KSD.repeat_interleave(self.groups, 0),
            self.v_KSD.repeat_interleave(self.groups, 0),
        )

    def take(self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, place: _Place) -> None:
        """Add gradients of a segment's own rows, over the heads that shared a key too."""
        self.q_HLD[:, : place.queries] = grad_q[:, : place.queries]
        for mine, theirs in ((self.k_KSD, grad_k), (self.v_KSD, grad_v)):
            own = theirs[:, : place.tokens]
            if self.groups > 1:
                own = own.reshape(-1, self.groups, *own.shape[1:]).sum(1)
            mine[:, : place.tokens] += own


def _penalties(place: _Place, window: int | None) -> Tensor:
    """(L, S), added to the scores of a segment's queries as far as its slices reach."""
    size = 128
    while size < place.tokens + _ROOM:
        size *= 2
    first = place.tokens - place.queries
    rows = slice(first, first + place.reach_queries)
    return _penalty(size, window)[rows, : place.reach_tokens]


class _Batched:
    """All heads in one batched product: the fewest calls."""

    @staticmethod
    def forward(cut: _Cut, place: _Place, window: int | None) -> tuple[Tensor, list[Tensor]]:
        k_HSD, v_HSD = cut.spread()
        scores_HLS = torch.baddbmm(_penalties(place, window), cut.q_HLD, k_HSD.transpose(1, 2))
        shares_HLS = scores_HLS.softmax(-1)
        return torch.bmm(shares_HLS, v_HSD), [shares_HLS]

    @staticmethod
    def backward(
        grad_HLD: Tensor, cut: _Cut, kept: list[Tensor], place: _Place, _: int | None, out: _Cut
    ) -> None:
        (shares_HLS,) = kept
        k_HSD, v_HSD = cut.spread()
        grad_shares_HLS = torch.bmm(grad_HLD, v_HSD.transpose(1, 2))
        grad_scores_HLS = _softmax_backward(grad_shares_HLS, shares_HLS)
        out.take(
            torch.bmm(grad_scores_HLS, k_HSD),
            torch.bmm(grad_scores_HLS.transpose(1, 2), cut.q_HLD),
            torch.bmm(shares_HLS.transpose(1, 2), grad_HLD),
            place,
        )


class _ByHead:
    """A product a head: the fastest library takes two dimensions only."""

    @staticmethod
    def forward(cut: _Cut, place: _Place, window: int | None) -> tuple[Tensor, list[Tensor]]:
        outs, kept = [], []
        penalties_LS = _penalties(place, window)
        for head, q_LD in enumerate(cut.q_HLD):
            k_SD, v_SD = cut.k_KSD[head // cut.groups], cut.v_KSD[head // cut.groups]
            shares_LS = product(q_LD, k_SD).add_(penalties_LS).softmax(-1)
            shares_LS[place.queries :] = 0
            outs.append(product(shares_LS, v_SD.t()))
            kept.append(shares_LS)
        return torch.stack(outs), kept

    @staticmethod
    def backward(
        grad_HLD: Tensor, cut: _Cut, kept: list[Tensor], place: _Place, _: int | None, out: _Cut
    ) -> None:
        for head, (q_LD, grad_LD, shares_LS) in enumerate(
            zip(cut.q_HLD, grad_HLD, kept, strict=True)
        ):
            group = head // cut.groups
            grad_scores_LS = _softmax_backward(product(grad_LD, cut.v_KSD[group]), shares_LS)
            grad_q = product(grad_scores_LS, cut.k_KSD[group].t())
            out.q_HLD[head, : place.queries] = grad_q[: place.queries]
            grad_k = product(grad_scores_LS.t(), q_LD.t())
            out.k_KSD[group, : place.tokens] += grad_k[: place.tokens]
            grad_v = product(shares_LS.t(), grad_LD.t())
            out.v_KSD[group, : place.tokens] += grad_v[: place.tokens]


class _Flash:
    """torch's kernel, whose memory grows with the tokens and not with their square."""

    @staticmethod
    def forward(cut: _Cut, place: _Place, window: int | None) -> tuple[Tensor, list[Tensor]]:
        mask = _flash_mask(place, window)
        out_1HLD, weight_1HL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            cut.q_HLD[None],
            *(x[None] for x in cut.spread()),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=1.0,
        )
        return out_1HLD[0], [out_1HLD, weight_1HL]

    @staticmethod
    def backward(
        grad_HLD: Tensor,
        cut: _Cut,
        kept: list[Tensor],
        place: _Place,
        window: int | None,
        out: _Cut,
    ) -> None:
        mask = _flash_mask(place, window)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_HLD[None],
            cut.q_HLD[None],
            *(x[None] for x in cut.spread()),
            *kept,
            0.0,
            mask is None,
            attn_mask=mask,
            scale=1.0,
        )
        out.take(grads[0][0], grads[1][0], grads[2][0], place)


def _flash_mask(place: _Place, window: int | None) -> Tensor | None:
    """(L, S); None for plain causal attention of all tokens on all."""
    is_banded = window is not None and window < place.tokens
    if not is_banded and place.queries == place.tokens:
        return None
    may_see = _may_see(place.queries, place.tokens, window, torch.device("cpu"))
    return torch.zeros(may_see.shape).masked_fill_(~may_see, -torch.inf)


def _way(place: _Place) -> type[_Batched] | type[_ByHead] | type[_Flash]:
    if place.tokens <= _SHORT:
        return _Batched
    return _ByHead if place.is_rounded else _Flash


def _softmax_backward(grad: Tensor, shares: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._softmax_backward_data(grad, shares, -1, torch.float32)
    return out

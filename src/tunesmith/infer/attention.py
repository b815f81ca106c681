"""Attention of one step: every sequence's new tokens look at that sequence's own cache.

T new tokens of a step, Q of one sequence, S cached tokens of it (its new ones included),
H query heads, K key and value heads, G query heads for each of those, D size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "tunesmith_cached"
"""What a model's attention is set to. No mask function has this name, so no mask is built."""


class Cache:
    """Keys and values of one sequence, for each layer, in memory that grows by whole blocks.

    The tensors are made at the first write, so each layer may have its own head count and size.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block = block_tokens
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def append(self, layer: int, k_KQD: Tensor, v_KQD: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Write at position `at`. Returns views of all up to there: (K, S, D) twice."""
        end = at + k_KQD.shape[1]
        keys = self._keys[layer] = self._room(self._keys.get(layer), k_KQD, end)
        values = self._values[layer] = self._room(self._values.get(layer), v_KQD, end)
        keys[:, at:end] = k_KQD
        values[:, at:end] = v_KQD
        return keys[:, :end], values[:, :end]

    def copy(self, tokens: int) -> "Cache":
        """A cache of its own that begins with the first tokens of this one."""
        made = Cache(self._block)
        for layer, k_KSD in self._keys.items():
            made.append(layer, k_KSD[:, :tokens], self._values[layer][:, :tokens], 0)
        return made

    @property
    def bytes(self) -> int:
        held = [*self._keys.values(), *self._values.values()]
        return sum(each.numel() * each.element_size() for each in held)

    def _room(self, old_KSD: Tensor | None, like_KQD: Tensor, end: int) -> Tensor:
        if old_KSD is not None and old_KSD.shape[1] >= end:
            return old_KSD
        heads, _, size = like_KQD.shape
        grown_KSD = like_KQD.new_empty(heads, -(-end // self._block) * self._block, size)
        if old_KSD is not None:
            grown_KSD[:, : old_KSD.shape[1]] = old_KSD
        return grown_KSD


@dataclass(frozen=True, slots=True)
class Span:
    """Where one sequence's new tokens lie: columns `start` to `end` of the row, at `offset`."""

    cache: Cache
    start: int
    end: int
    offset: int
    """Position in the sequence of the first of them."""


@dataclass(slots=True)
class Step:
    """The spans of the forward pass under way; masks are built once for all layers."""

    spans: list[Span]
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, queries: int, offset: int, window: int | None, like: Tensor) -> Tensor | None:
        key = (queries, offset, window)
        if key not in self.masks:
            self.masks[key] = visible(queries, offset, window, like.device)
        return self.masks[key]


_step: ContextVar[Step] = ContextVar("step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Within this, a model whose attention is `NAME` works on `step`."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: (1, H, T, D) in, (1, T, H, D) out."""
    layer = int(getattr(module, "layer_idx"))  # noqa: B009  (nn.Module types it as a Tensor)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None else _own_window(module, layer)
    step = _step.get()
    parts = []
    for span in step.spans:
        columns = slice(span.start, span.end)
        k_KSD, v_KSD = span.cache.append(
            layer, key[0, :, columns], value[0, :, columns], span.offset
        )
        parts.append(
            _look_back(step, query[0, :, columns], k_KSD, v_KSD, _Rule(scale, window, softcap))
        )
    return torch.cat(parts, dim=1).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(NAME, attend)


@dataclass(frozen=True, slots=True)
class _Rule:
    scale: float
    window: int | None
    softcap: float | None


def _look_back(step: Step, q_HQD: Tensor, k_KSD: Tensor, v_KSD: Tensor, rule: _Rule) -> Tensor:
    """Attention of one sequence. Returns (H, Q, D).

    Query heads that share a key head are laid out as more rows of it, so that keys and values are
    read where they lie and never repeated (Ainslie et al. 2023, arXiv:2305.13245).
    """
    queries, seen = q_HQD.shape[1], k_KSD.shape[1]
    if rule.window is not None and seen > rule.window + queries - 1:
        oldest = seen - (rule.window + queries - 1)
        k_KSD, v_KSD, seen = k_KSD[:, oldest:], v_KSD[:, oldest:], seen - oldest
    heads = k_KSD.shape[0]
    groups = q_HQD.shape[0] // heads
    mask = step.mask(queries, seen - queries, rule.window, q_HQD)
    if mask is not None and groups > 1:
        mask = mask.repeat(groups, 1)
    packed = q_HQD.reshape(1, heads, groups * queries, -1)
    if rule.softcap is None:
        out = F.scaled_dot_product_attention(
            packed, k_KSD[None], v_KSD[None], attn_mask=mask, scale=rule.scale
        )
    else:
        out = _capped(packed, k_KSD[None], v_KSD[None], mask, rule)
    return out.reshape(heads * groups, queries, -1)


def _capped(
    q_1KQD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, mask: Tensor | None, rule: _Rule
) -> Tensor:
    """Scores squeezed by tanh before the softmax (Gemma 2, arXiv:2408.00118, section 2)."""
    assert rule.softcap is not None
    scores = (q_1KQD @ k_1KSD.transpose(-1, -2)) * rule.scale
    scores = (scores / rule.softcap).tanh() * rule.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v_1KSD.dtype) @ v_1KSD


def visible(queries: int, offset: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of `offset + queries` keys each query may see: (Q, S) bool, or None for all of them."""
    if queries == 1 and (window is None or offset < window):
        return None
    rows_Q1 = torch.arange(offset, offset + queries, device=device)[:, None]
    columns_1S = torch.arange(offset + queries, device=device)[None, :]
    mask_QS = columns_1S <= rows_Q1
    return mask_QS if window is None else mask_QS & (columns_1S > rows_Q1 - window)


def _own_window(module: nn.Module, layer: int) -> int | None:
    """The window of an architecture that does not hand it to the attention function."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types and layer < len(types) and types[layer] == "sliding_attention":
        window = getattr(config, "sliding_window", None)
        return int(window) if isinstance(window, int) else None
    return None

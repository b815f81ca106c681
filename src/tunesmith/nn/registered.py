"""Our attention inside every transformers model: registered there under `ATTENTION`.

A model set to it gets a flat row (1, T), positions that restart, and `flat_segments` as a keyword
that transformers hands through to each layer's attention.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.nn.attention import AttentionRule, Looking, Segments, attend

ATTENTION = "tunesmith_segments"

_REFUSED = ("s_aux", "position_bias", "head_mask", "cross_attention")
"""Keywords that change what attention means and that `attend` does not know."""


class AttentionNotServed(Exception):
    """The architecture asks for something that segment-wise attention does not do."""


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flat_segments: Segments | Looking | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, D), key and value (1, kv heads, T, D) → (1, T, heads, D)."""
    _check(module, query, key, attention_mask, flat_segments, is_causal, kwargs)
    assert flat_segments is not None
    rule = AttentionRule(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
    )
    return attend(query[0], key[0], value[0], flat_segments, rule)[None].contiguous(), None


def _check(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    segments: Segments | Looking | None,
    is_causal: bool | None,
    rest: dict[str, Any],
) -> None:
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    odd = [name for name in _REFUSED if rest.get(name) is not None]
    if segments is None:
        raise AttentionNotServed("flat_segments does not reach the attention")
    if not causal or odd or mask is not None:
        raise AttentionNotServed(f"not plain causal attention: {odd or 'a mask, or both ways'}")
    tokens = segments.queries[-1] if isinstance(segments, Segments) else query.shape[2]
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise AttentionNotServed("not one flat row")


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Segments need no mask tensor."""


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, _no_mask)

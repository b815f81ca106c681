"""All segments of a flat row in one flash attention kernel, on CUDA in bf16 or fp16.

T tokens, Q of them as queries, H query heads, K key and value heads, D head size.
Written against torch.nn.attention.varlen; a machine without CUDA never comes here.
"""

import functools
from itertools import pairwise

import torch
from torch import Tensor

_HALVED = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


def is_served(q_HQD: Tensor, v_KTD: Tensor) -> bool:
    """Whether the kernel takes these tensors."""
    size = v_KTD.shape[-1]
    return (
        q_HQD.device.type == "cuda"
        and v_KTD.dtype in _HALVED
        and q_HQD.shape[-1] == size
        and size <= _LARGEST_HEAD
        and size % 8 == 0
    )


def attend_varlen(
    q_HQD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    bounds: tuple[int, ...],
    query_bounds: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal inside each segment → (Q, H, D). Fewer queries than tokens are its last ones."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = v_KTD.dtype
    q_QHD, k_TKD, v_TKD = (x.transpose(0, 1).to(dtype).contiguous() for x in (q_HQD, k_KTD, v_KTD))
    out = varlen_attn(
        q_QHD[: query_bounds[-1]],
        k_TKD[: bounds[-1]],
        v_TKD[: bounds[-1]],
        _on_device(query_bounds, q_QHD.device),
        _on_device(bounds, q_QHD.device),
        _longest(query_bounds),
        _longest(bounds),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_HQD.shape[0] != k_KTD.shape[0],
    )
    assert isinstance(out, Tensor)
    return out


@functools.lru_cache(maxsize=4)
def _on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Asked for by every layer of a step."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _longest(bounds: tuple[int, ...]) -> int:
    return max(b - a for a, b in pairwise(bounds))

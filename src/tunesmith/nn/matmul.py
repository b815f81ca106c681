"""The product that all else is made of, by the fastest library for this processor.

M, N, K are the sizes of a product: (M, K) times the transpose of (N, K).

torch multiplies fp32 with MKL, which leaves the AVX-512 units of other makers' processors unused;
oneDNN, which torch also carries, uses them. Measured on one Zen 5 core: 98 against 229 GFLOP/s.
The choice hangs on the processor alone, so that it is the same in every attempt of a job.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

SHAPE_STEP = 32
"""oneDNN compiles a kernel for each shape, a millisecond or so: sizes that vary are rounded up."""


@functools.cache
def prefers_onednn() -> bool:
    """Whether fp32 products on this machine are oneDNN's."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in processor and "avx512f" in processor


def is_exact(x: Tensor) -> bool:
    """Whether it is computed with on a CPU, in fp32."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return not torch.is_autocast_enabled("cpu")


def is_onednn(x: Tensor) -> bool:
    """Whether a product with `x` goes to oneDNN."""
    return is_exact(x) and prefers_onednn()


def product(
    x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None, plus_MN: Tensor | None = None
) -> Tensor:
    """x @ w.T + bias + plus. Not differentiable; the arguments are left alone."""
    if not is_onednn(x_MK) or min(x_MK.shape) == 0:
        return _by_torch(x_MK, w_NK, bias_N, plus_MN)
    if plus_MN is not None:
        x_MK, w_NK = _dense(x_MK), _dense(w_NK)
        fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x_MK, plus_MN, w_NK, bias_N, "add"
        )
        return fused
    if bias_N is None and _is_better_swapped(x_MK, w_NK):
        return _by_onednn(w_NK, x_MK, None).t()
    return _by_onednn(x_MK, w_NK, bias_N)


def _is_better_swapped(x_MK: Tensor, w_NK: Tensor) -> bool:
    """oneDNN copies its first argument where it is transposed, as a weight's gradient has it.

    The other way round the smaller argument is copied, and the product comes out transposed.
    """
    if x_MK.is_contiguous() or w_NK.is_contiguous():
        return False
    return w_NK.numel() + x_MK.shape[0] * w_NK.shape[0] < x_MK.numel()


def _by_onednn(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        _dense(x_MK), _dense(w_NK), bias_N, "none", [], ""
    )
    return out


def _by_torch(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None, plus_MN: Tensor | None) -> Tensor:
    if plus_MN is None:
        return torch.nn.functional.linear(x_MK, w_NK, bias_N)
    out_MN = torch.addmm(plus_MN, x_MK, w_NK.t())
    return out_MN if bias_N is None else out_MN.add_(bias_N)


def _dense(x: Tensor) -> Tensor:
    """oneDNN falls back to a reference loop, a thousand times slower, on any other stride."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()

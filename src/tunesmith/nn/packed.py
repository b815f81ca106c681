"""Linear layers that are only read, packed once in the order in which the processor wants them.

T rows, K inputs, N outputs. All are products of a CPU; on anything else torch's own are as good.
"""

import functools
import platform
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["fp32", "bf16", "int8"]
_INTEGER_UNITS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_HALF_UNITS = {"avx512_bf16", "amx_bf16"}
_STEPS = ((4, 1), (32, 4), (64, 8))
"""Rows up to so many are rounded up by so much, more by 32."""


@functools.cache
def processor_units() -> frozenset[str]:
    """What the processor says that it can do; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


@functools.cache
def can_int8() -> bool:
    """Whether whole-number products are several times as fast as others here."""
    is_known = platform.machine() in {"x86_64", "AMD64"} and hasattr(torch.ops, "onednn")
    return bool(is_known and processor_units() & _INTEGER_UNITS and torch._C._has_mkldnn)


@functools.cache
def can_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; without that it is slower than fp32."""
    return bool(processor_units() & _HALF_UNITS)


def beside(precision: Precision) -> torch.dtype:
    """What is read in each step beside the weights is held in: half as much to read, where the
    weights are rounded too and the processor has units for it."""
    return torch.bfloat16 if precision != "fp32" and can_bf16() else torch.float32


def best_precision() -> Precision:
    return "int8" if can_int8() else "fp32"


def rounded(rows: int) -> int:
    """oneDNN compiles a kernel for each count of rows, some ms: few counts occur."""
    step = next((step for most, step in _STEPS if rows <= most), 32)
    return -(-rows // step) * step


class Packed(Protocol):
    """x @ weight.T + bias."""

    outputs: int
    bias_N: Tensor | None

    def product(self, x_TK: Tensor) -> Tensor:
        """Without the bias: (T, N) in fp32, to do with as one likes."""

    def onto(self, x_TK: Tensor, plus_TN: Tensor) -> Tensor:
        """The product, the bias and `plus`, which is left alone."""

    def lengths(self) -> Tensor:
        """Of each output's weights (N,)."""


def pack(weight_NK: Tensor, bias_N: Tensor | None, precision: Precision) -> Packed:
    """The weight in whatever type it was saved; it is not kept."""
    bias_N = None if bias_N is None else bias_N.float()
    kinds: dict[Precision, type[Single | Half | Int8]] = {
        "fp32": Single,
        "bf16": Half,
        "int8": Int8,
    }
    return kinds[precision](weight_NK.float(), bias_N)


def apply(packed: Packed, x_TK: Tensor) -> Tensor:
    """(T, N)."""
    out_TN = packed.product(x_TK)
    return out_TN if packed.bias_N is None else out_TN.add_(packed.bias_N)


class Single:
    """fp32, and what comes out is that of a plain product."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.outputs, self.bias_N = weight_NK.shape[0], bias_N
        self._lengths_N: Tensor = torch.linalg.vector_norm(weight_NK, dim=1)
        with torch.inference_mode(False), torch.no_grad():
            self._is_packed = _has_packed_products()
            self._weight = (
                torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)
                if self._is_packed
                else weight_NK.contiguous()
            )

    def product(self, x_TK: Tensor) -> Tensor:
        if not self._is_packed:
            return F.linear(x_TK, self._weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, None, "none", [], "")
        return out

    def onto(self, x_TK: Tensor, plus_TN: Tensor) -> Tensor:
        out_TN: Tensor = self.product(x_TK).add_(plus_TN)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)

    def lengths(self) -> Tensor:
        return self._lengths_N


class Half:
    """bf16 weights and inputs; sums and what comes out are fp32."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.outputs, self.bias_N = weight_NK.shape[0], bias_N
        self._weight_NK = weight_NK.bfloat16().contiguous()

    def product(self, x_TK: Tensor) -> Tensor:
        out_TN: Tensor = F.linear(x_TK.bfloat16(), self._weight_NK).float()
        return out_TN

    def onto(self, x_TK: Tensor, plus_TN: Tensor) -> Tensor:
        out_TN: Tensor = self.product(x_TK).add_(plus_TN)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)

    def lengths(self) -> Tensor:
        lengths_N: Tensor = torch.linalg.vector_norm(self._weight_NK.float(), dim=1)
        return lengths_N


class Int8:
    """Whole numbers of 8 bits: a scale for each output's weights, and one for each row of inputs,
    found as it comes. So a row owes nothing to its neighbours.

    The rounding of both: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (vector-wise, absmax).
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.outputs, self.bias_N = weight_NK.shape[0], bias_N
        scale_N1 = _steps(weight_NK)
        # What is packed is read as it lies: a transposed weight, GPT-2's, is not in order.
        whole_NK = (weight_NK / scale_N1).round_().to(torch.int8).contiguous()
        self._lengths_N: Tensor = torch.linalg.vector_norm(whole_NK.float(), dim=1)
        self._lengths_N *= scale_N1[:, 0]
        self._scale_N = scale_N1[:, 0].contiguous()
        with torch.inference_mode(False), torch.no_grad():
            self._weight = torch.ops.onednn.qlinear_prepack(whole_NK, None)
            self._zeros_N = torch.zeros(self.outputs, dtype=torch.int32)

    def product(self, x_TK: Tensor) -> Tensor:
        out_TN, scale_T1 = self._whole_product(x_TK)
        return out_TN.mul_(scale_T1)

    def onto(self, x_TK: Tensor, plus_TN: Tensor) -> Tensor:
        out_TN, scale_T1 = self._whole_product(x_TK)
        out_TN = torch.addcmul(plus_TN, out_TN, scale_T1)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)

    def lengths(self) -> Tensor:
        return self._lengths_N

    def _whole_product(self, x_TK: Tensor) -> tuple[Tensor, Tensor]:
        scale_T1 = _steps(x_TK)
        whole_TK = x_TK.div(scale_T1).round_().to(torch.int8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole_TK,
            1.0,
            0,
            self._weight,
            self._scale_N,
            self._zeros_N,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out, scale_T1


def _steps(x_TK: Tensor) -> Tensor:
    """(T, 1): what one whole number stands for. A row of zeros has any step but none."""
    return x_TK.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)


@functools.cache
def _has_packed_products() -> bool:
    """Whether oneDNN keeps fp32 weights in an order of its own here."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(32, 32), None)
        out = torch.ops.mkldnn._linear_pointwise(torch.ones(2, 32), weight, None, "none", [], "")
    except RuntimeError:
        return False
    return bool((out == 32).all())

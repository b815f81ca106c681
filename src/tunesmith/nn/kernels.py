"""The arithmetic between the products, each function one pass or a few; eager, or compiled to one.

T tokens, H hidden size, I inner size. Compiling takes some seconds of CPU once in a process and
saves a few percent of a step: it pays on long jobs only.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Kernels:
    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """x, weight, epsilon → x / rms(x) * weight, and 1 / rms(x) as (T, 1)."""
    rms_norm_input: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """The gradient of x, from x, weight, 1 / rms(x) and the output's gradient."""
    rms_norm_weight: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The gradient of the weight, from x, 1 / rms(x) and the output's gradient."""
    swiglu: Callable[[Tensor], Tensor]
    """silu(gate) * up, of (T, 2 I) with the gates first."""
    swiglu_input: Callable[[Tensor, Tensor], Tensor]
    """The gradient of gates and ups, from those and the output's gradient."""


def _rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True)
    inverse_T1 = norm_T1.square_().div_(x_TH.shape[-1]).add_(epsilon).rsqrt_()
    return (x_TH * inverse_T1).mul_(weight_H), inverse_T1


def _rms_norm_input(x_TH: Tensor, weight_H: Tensor, inverse_T1: Tensor, grad_TH: Tensor) -> Tensor:
    both_TH = grad_TH * x_TH
    along_T1 = (both_TH @ weight_H)[:, None].mul_(inverse_T1**3).div_(-x_TH.shape[-1])
    grad_x = torch.mul(grad_TH, weight_H, out=both_TH).mul_(inverse_T1)
    return grad_x.addcmul_(x_TH, along_T1)


def _rms_norm_weight(x_TH: Tensor, inverse_T1: Tensor, grad_TH: Tensor) -> Tensor:
    return inverse_T1[:, 0] @ (grad_TH * x_TH)


def _swiglu(gate_up_T2I: Tensor) -> Tensor:
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    return F.silu(gate_TI).mul_(up_TI)


def _swiglu_input(gate_up_T2I: Tensor, grad_TI: Tensor) -> Tensor:
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    out_T2I = torch.empty_like(gate_up_T2I)
    out_gate_TI, out_up_TI = out_T2I.chunk(2, -1)
    torch.mul(F.silu(gate_TI), grad_TI, out=out_up_TI)
    torch.ops.aten.silu_backward.grad_input(grad_TI * up_TI, gate_TI, grad_input=out_gate_TI)
    return out_T2I


EAGER = Kernels(_rms_norm, _rms_norm_input, _rms_norm_weight, _swiglu, _swiglu_input)


def _plain_rms_norm_input(
    x_TH: Tensor, weight_H: Tensor, inverse_T1: Tensor, grad_TH: Tensor
) -> Tensor:
    scaled_TH, normal_TH = grad_TH * weight_H, x_TH * inverse_T1
    along_T1 = (scaled_TH * normal_TH).mean(-1, keepdim=True)
    return (scaled_TH - normal_TH * along_T1) * inverse_T1


def _plain_rms_norm_weight(x_TH: Tensor, inverse_T1: Tensor, grad_TH: Tensor) -> Tensor:
    return (grad_TH * x_TH * inverse_T1).sum(0)


def _plain_swiglu(gate_up_T2I: Tensor) -> Tensor:
    gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
    return F.silu(gate_TI) * up_TI


@functools.cache
def compiled() -> Kernels:
    """Those that gain by it, as plain arithmetic that the compiler fuses to one loop of any size.

    Falls back to `EAGER`, with a warning, where there is no C++ compiler.
    """
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    kernels = replace(
        EAGER,
        rms_norm_input=_compile(_plain_rms_norm_input),
        rms_norm_weight=_compile(_plain_rms_norm_weight),
        swiglu=_compile(_plain_swiglu),
    )
    try:
        with torch.no_grad():
            _run_once(kernels)
    except Exception as error:
        warnings.warn(f"not compiled, running as it is: {error}", RuntimeWarning, stacklevel=2)
        return EAGER
    return kernels


def _compile(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Detached, so that it is compiled once, whoever calls it: the gradients are written out."""
    inner = torch.compile(kernel, dynamic=True)

    def call(*given: Any) -> Any:
        return inner(*(one.detach() if isinstance(one, Tensor) else one for one in given))

    return call


def _run_once(kernels: Kernels) -> None:
    x_TH, weight_H = torch.ones(33, 48), torch.ones(48)
    _, inverse_T1 = kernels.rms_norm(x_TH, weight_H, 1e-5)
    kernels.rms_norm_input(x_TH, weight_H, inverse_T1, x_TH)
    kernels.rms_norm_weight(x_TH, inverse_T1, x_TH)
    kernels.swiglu_input(x_TH, kernels.swiglu(x_TH))

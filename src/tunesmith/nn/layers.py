"""The layers of a decoder with their gradients written out: few passes over memory, little saved.

T tokens, H hidden size, N outputs, I inner size of the feed-forward layer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.nn.kernels import EAGER, Kernels
from tunesmith.nn.matmul import product


def linear(
    x_TH: Tensor, weight_NH: Tensor, bias_N: Tensor | None, plus_TN: Tensor | None
) -> Tensor:
    """x @ weight.T + bias + plus (T, N)."""
    out: Tensor = _Linear.apply(x_TH, weight_NH, bias_N, plus_TN)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_NH: Tensor, bias_N: Tensor | None, plus_TN: Tensor | None
    ) -> Tensor:
        _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x_TH if needs_weight else None, weight_NH)
        return product(x_TH, weight_NH, bias_N, plus_TN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_NH = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_plus = ctx.needs_input_grad
        return (
            product(grad_TN, weight_NH.t()) if needs_x else None,
            product(grad_TN.t(), x_TH.t()) if needs_weight else None,
            grad_TN.sum(0) if needs_bias else None,
            grad_TN if needs_plus else None,
        )


def adapted_linear(
    x_TH: Tensor,
    weight_NH: Tensor,
    bias_N: Tensor | None,
    down_RH: Tensor,
    up_NR: Tensor,
    plus_TN: Tensor | None,
) -> Tensor:
    """linear, and x @ down.T @ up.T on top. R is the adapters' joint rank; `up` holds the scale."""
    out: Tensor = _AdaptedLinear.apply(x_TH, weight_NH, bias_N, down_RH, up_NR, plus_TN)  # type: ignore[no-untyped-call]
    return out


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_NH: Tensor,
        bias_N: Tensor | None,
        down_RH: Tensor,
        up_NR: Tensor,
        plus_TN: Tensor | None,
    ) -> Tensor:
        low_TR = product(x_TH, down_RH)
        ctx.save_for_backward(x_TH, weight_NH, down_RH, up_NR, low_TR)
        return product(low_TR, up_NR, None, product(x_TH, weight_NH, bias_N, plus_TN))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_NH, down_RH, up_NR, low_TR = ctx.saved_tensors
        grad_low_TR = product(grad_TN, up_NR.t())
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_low_TR, down_RH.t(), None, product(grad_TN, weight_NH.t()))
        return (
            grad_x,
            None,
            None,
            product(grad_low_TR.t(), x_TH.t()),
            product(grad_TN.t(), low_TR.t()),
            grad_TN if ctx.needs_input_grad[5] else None,
        )


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float, kernels: Kernels = EAGER) -> Tensor:
    """Zhang and Sennrich 2019, arXiv:1910.07467: x / rms(x) * weight over the last dimension."""
    out: Tensor = _RmsNorm.apply(x_TH, weight_H, epsilon, kernels)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_H: Tensor, epsilon: float, kernels: Kernels
    ) -> Tensor:
        out_TH, inverse_T1 = kernels.rms_norm(x_TH, weight_H, epsilon)
        ctx.save_for_backward(x_TH, weight_H, inverse_T1)
        ctx.kernels = kernels
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_H, inverse_T1 = ctx.saved_tensors
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        kernels = ctx.kernels
        return (
            kernels.rms_norm_input(x_TH, weight_H, inverse_T1, grad_TH) if needs_x else None,
            kernels.rms_norm_weight(x_TH, inverse_T1, grad_TH) if needs_weight else None,
            None,
            None,
        )


def swiglu(gate_up_T2I: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """Shazeer 2020, arXiv:2002.05202: silu(gate) * up, the halves of the last dimension."""
    out: Tensor = _Swiglu.apply(gate_up_T2I, kernels)  # type: ignore[no-untyped-call]
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2I: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_up_T2I)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up_T2I)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, None]:
        (gate_up_T2I,) = ctx.saved_tensors
        return ctx.kernels.swiglu_input(gate_up_T2I, grad_TI), None


def split_heads(
    x_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The first heads turned by their positions, the others as they are: each (heads, T, D).

    `heads` says how many of either; cos and sin are (T, D / 2). A head's first half is turned
    against its second half (Su et al. 2021, arXiv:2104.09864, as Llama lays it out).
    """
    turned: Tensor
    straight: Tensor
    turned, straight = _SplitHeads.apply(x_TN, cos_TD, sin_TD, heads)  # type: ignore[no-untyped-call]
    return turned, straight


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TD, sin_TD)
        tokens, half = cos_TD.shape
        x_HT2D = x_TN.view(tokens, -1, 2, half).transpose(0, 1)
        turned = x_TN.new_empty(heads[0], tokens, 2, half)
        _turn(x_HT2D[: heads[0]], cos_TD, sin_TD, turned, 1)
        return turned.flatten(2), x_HT2D[heads[0] :].flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_turned: Tensor, grad_straight: Tensor) -> tuple[Tensor | None, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        tokens, half = cos_TD.shape
        turned = grad_turned.shape[0]
        out_TH2D = cos_TD.new_empty(tokens, turned + grad_straight.shape[0], 2, half)
        out_HT2D = out_TH2D.transpose(0, 1)
        _turn(grad_turned.view(turned, tokens, 2, half), cos_TD, sin_TD, out_HT2D[:turned], -1)
        out_HT2D[turned:] = grad_straight.reshape(-1, tokens, 2, half)
        return out_TH2D.flatten(1), None, None, None


def _turn(x_HT2D: Tensor, cos_TD: Tensor, sin_TD: Tensor, out_HT2D: Tensor, way: int) -> None:
    """By the positions' angles, or, with `way` -1, back."""
    first, second = x_HT2D[:, :, 0], x_HT2D[:, :, 1]
    out_first, out_second = out_HT2D[:, :, 0], out_HT2D[:, :, 1]
    torch.mul(first, cos_TD, out=out_first).addcmul_(second, sin_TD, value=-way)
    torch.mul(second, cos_TD, out=out_second).addcmul_(first, sin_TD, value=way)

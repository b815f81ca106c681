"""Loss of the label rows, or each one's log-probability, with a chunk of logits alive at a time.

R label rows, H hidden size, V vocabulary entries. The gradient of cross-entropy with respect to the
logits is softmax minus one-hot, so it is taken in the forward pass while a chunk is at hand.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tunesmith.nn.matmul import is_onednn, product

CHUNK_LOGITS = 1 << 20
"""Logits alive at once: 4 MiB in fp32, so that they stay in the cache of a CPU."""
CHUNK_ROWS = 512
"""Over a large vocabulary: each chunk reads the head's weight and writes its gradient once, which
few rows would not be worth."""
LARGE = 8192
"""Entries of a vocabulary, the weight of which fits in no cache."""


def linear_cross_entropy_sum(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T + bias)[target]: a scalar in fp32.

    Differentiable once, with respect to hidden, weight and bias. Logits are taken in fp32.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden_RH, weight_VH, targets_R, bias_V)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, bias_V: Any
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden_RH) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_RH.device)
        for rows in _chunks(hidden_RH.shape[0], weight_VH.shape[0]):
            hidden_CH = hidden_RH[rows]
            logits_CV = product(hidden_CH, weight_VH).float()
            if bias_V is not None:
                logits_CV += bias_V
            total += _loss_then_gradient_(logits_CV, targets_R[rows, None])
            if grad_hidden is not None:
                grad_hidden[rows] = product(logits_CV.to(weight_VH.dtype), weight_VH.t())
            if grad_weight is not None:
                _add_product_(grad_weight, logits_CV, hidden_CH)
            if grad_bias is not None:
                grad_bias += logits_CV.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)  # type: ignore[arg-type]
        ctx.weight_dtype = weight_VH.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        dtype = ctx.weight_dtype
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(dtype),
            None,
            None if grad_bias is None else (grad_bias * grad).to(dtype),
        )


def _loss_then_gradient_(logits_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """The chunk's loss; afterwards `logits_CV` holds d loss / d logits."""
    highest_C1 = logits_CV.gather(1, targets_C1)
    normaliser_C1 = logits_CV.logsumexp(1, keepdim=True)
    loss = (normaliser_C1 - highest_C1).sum()
    logits_CV.sub_(normaliser_C1).exp_()
    logits_CV.scatter_add_(1, targets_C1, torch.full_like(highest_C1, -1.0))
    return loss


@torch.no_grad()
def linear_grades(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """Two numbers in float64: the sum of the rows' losses, and how many rows have the target for
    the likeliest entry. Nothing is differentiable, and a chunk of logits is alive at a time."""
    found_2 = torch.zeros(2, dtype=torch.float64, device=hidden_RH.device)
    for rows in _chunks(hidden_RH.shape[0], weight_VH.shape[0]):
        logits_CV = _logits(hidden_RH[rows], weight_VH, bias_V)
        target_C1 = logits_CV.gather(1, targets_R[rows, None])
        found_2[0] += (logits_CV.logsumexp(1, keepdim=True) - target_C1).double().sum()
        found_2[1] += (logits_CV.argmax(1) == targets_R[rows]).sum()
    return found_2


def linear_log_probs(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[target] of each row: (R,) in fp32.

    Differentiable once, with respect to hidden, weight and bias. How much each row weighs is known
    in the backward pass only, so the logits are worked out again there for weight and bias.
    """
    found: Tensor = _LinearLogProbs.apply(hidden_RH, weight_VH, targets_R, bias_V)  # type: ignore[no-untyped-call]
    return found


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, bias_V: Tensor | None
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_RH) if needs_hidden else None
        found_R = torch.empty(hidden_RH.shape[0], dtype=torch.float32, device=hidden_RH.device)
        normaliser_R1 = torch.empty_like(found_R)[:, None]
        for rows in _chunks(hidden_RH.shape[0], weight_VH.shape[0]):
            logits_CV = _logits(hidden_RH[rows], weight_VH, bias_V)
            normaliser_R1[rows] = logits_CV.logsumexp(1, keepdim=True)
            target_C1 = logits_CV.gather(1, targets_R[rows, None])
            found_R[rows] = (target_C1 - normaliser_R1[rows])[:, 0]
            if grad_hidden is not None:
                _log_prob_gradient_(logits_CV, normaliser_R1[rows], targets_R[rows, None])
                grad_hidden[rows] = product(logits_CV.to(weight_VH.dtype), weight_VH.t())
        again = (hidden_RH, weight_VH, targets_R, bias_V, normaliser_R1)
        ctx.save_for_backward(grad_hidden, *(again if needs_weight or needs_bias else ()))
        return found_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *again = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_R[:, None].to(grad_hidden.dtype)
        grad_weight, grad_bias = _head_gradients(ctx, grad_R, *again) if again else (None, None)
        return grad_hidden, grad_weight, None, grad_bias


def _head_gradients(
    ctx: Any,
    grad_R: Tensor,
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    normaliser_R1: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    _, needs_weight, _, needs_bias = ctx.needs_input_grad
    grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
    grad_bias = None
    if needs_bias and bias_V is not None:
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32)
    for rows in _chunks(hidden_RH.shape[0], weight_VH.shape[0]):
        logits_CV = _logits(hidden_RH[rows], weight_VH, bias_V)
        _log_prob_gradient_(logits_CV, normaliser_R1[rows], targets_R[rows, None])
        logits_CV *= grad_R[rows, None]
        if grad_weight is not None:
            _add_product_(grad_weight, logits_CV, hidden_RH[rows])
        if grad_bias is not None:
            grad_bias += logits_CV.sum(0)
    dtype = weight_VH.dtype
    return (
        None if grad_weight is None else grad_weight.to(dtype),
        None if grad_bias is None else grad_bias.to(dtype),
    )


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(CHUNK_ROWS if vocabulary > LARGE else 16, CHUNK_LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


def _add_product_(grad_VH: Tensor, logits_CV: Tensor, hidden_CH: Tensor) -> None:
    """grad += logits.T @ hidden, without a second matrix of its size where that can be helped."""
    if is_onednn(grad_VH):
        grad_VH += product(logits_CV.t(), hidden_CH.t().float())
    else:
        grad_VH.addmm_(logits_CV.t(), hidden_CH.float())


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_CV = product(hidden_CH, weight_VH).float()
    return logits_CV if bias_V is None else logits_CV.add_(bias_V)


def _log_prob_gradient_(logits_CV: Tensor, normaliser_C1: Tensor, targets_C1: Tensor) -> None:
    """Afterwards `logits_CV` holds d log-probability / d logits: one-hot minus softmax."""
    logits_CV.sub_(normaliser_C1).exp_().neg_()
    logits_CV.scatter_add_(1, targets_C1, torch.ones_like(normaliser_C1))

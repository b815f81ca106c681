"""The learning rate of each optimizer step, as `transformers` shapes it."""

import math

from tunesmith.spec.train import Optim


def warmup_steps(optim: Optim, total_steps: int) -> int:
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    return math.ceil(optim.warmup_ratio * total_steps)


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of the update that comes after `step` updates: it starts at 0 where there is a
    warm-up, and would reach 0 (but for a constant one) after `total_steps`.
    """
    warmup = warmup_steps(optim, total_steps)
    if step < warmup:
        return optim.learning_rate * step / warmup
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return optim.learning_rate * _decay(optim.scheduler, share)


def _decay(scheduler: str, share: float) -> float:
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    if scheduler == "linear":
        return 1.0 - share
    return 1.0

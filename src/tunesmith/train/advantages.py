"""How much better a completion, or a token of it, was than could be expected.

G prompts, n completions of each, N completions of a round, T tokens of one completion.
"""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
_EPSILON = 1e-4
"""Beside a standard deviation; TRL has it so."""


def of_group(rewards_Gn: Tensor, scale: Scale) -> Tensor:
    """Rewards less their prompt's mean, over a standard deviation: of the prompt's (GRPO: Shao et
    al. 2024, arXiv:2402.03300, section 4.1.2), of all, or none (Dr. GRPO: Liu et al. 2025,
    arXiv:2503.20783, section 3.2)."""
    centred_Gn = rewards_Gn - rewards_Gn.mean(1, keepdim=True)
    if scale == "none":
        return centred_Gn
    spread = rewards_Gn.std(1, keepdim=True) if scale == "group" else rewards_Gn.std()
    return centred_Gn / (spread + _EPSILON)


def leave_one_out(rewards_Gn: Tensor) -> Tensor:
    """Rewards less the mean of the prompt's other completions (Kool et al. 2019; RLOO: Ahmadian et
    al. 2024, arXiv:2402.14740, eq. 7)."""
    others = rewards_Gn.shape[1] - 1
    return rewards_Gn - (rewards_Gn.sum(1, keepdim=True) - rewards_Gn) / others


def whitened(values: Tensor, *, keeps_mean: bool = False) -> Tensor:
    """With mean 0 and variance 1; or with the mean they had."""
    mean = values.mean()
    white = (values - mean) * torch.rsqrt(values.var(unbiased=False) + 1e-8)
    return white + mean if keeps_mean else white


def generalised(rewards_T: Tensor, values_T: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16): after the
    last token nothing is worth anything."""
    next_T = torch.cat([values_T[1:], values_T.new_zeros(1)])
    deltas = (rewards_T + gamma * next_T - values_T).tolist()
    found, ahead = [0.0] * len(deltas), 0.0
    for at in reversed(range(len(deltas))):
        ahead = deltas[at] + gamma * lam * ahead
        found[at] = ahead
    return torch.tensor(found, dtype=values_T.dtype)

"""What stands in for the reward in a step: clipped ratios, and what divergence costs.

T tokens (or N completions, each as one) with log-probabilities by the policy now, by the one that
drew them (`old`), and by the model as it was opened (`reference`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """How far the ratio may go from 1 before its gain is clipped."""

    low: float
    high: float


def clipped(log_ratio_T: Tensor, advantages_T: Tensor, clip: Clip) -> Tensor:
    """-min(r A, clip(r) A) (PPO: Schulman et al. 2017, arXiv:1707.06347, eq. 7; with bounds of
    their own DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 10)."""
    ratio_T = log_ratio_T.exp()
    bounded_T = ratio_T.clamp(1 - clip.low, 1 + clip.high)
    return -torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T)


def is_clipped(log_ratio_T: Tensor, advantages_T: Tensor, clip: Clip) -> Tensor:
    """Where the gradient is cut off."""
    ratio_T = log_ratio_T.detach().exp()
    is_low_T = (ratio_T < 1 - clip.low) & (advantages_T < 0)
    return is_low_T | ((ratio_T > 1 + clip.high) & (advantages_T > 0))


def clipped_value(values_T: Tensor, old_T: Tensor, returns_T: Tensor, reach: float) -> Tensor:
    """Half the larger of two squared errors, one of the value kept within `reach` of what it was
    (as in the authors' code for PPO; Engstrom et al. 2020, arXiv:2005.12729, section 3)."""
    near_T = old_T + (values_T - old_T).clamp(-reach, reach)
    return 0.5 * torch.maximum((values_T - returns_T) ** 2, (near_T - returns_T) ** 2)


def k1(log_probs_T: Tensor, reference_T: Tensor) -> Tensor:
    """log p - log q of what p drew: its mean is KL(p || q), some of it below 0 (Schulman 2020,
    "Approximating KL divergence")."""
    return log_probs_T - reference_T


def k3(log_probs_T: Tensor, reference_T: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): as k1 in the mean, and never below 0 (same source)."""
    away_T = reference_T - log_probs_T
    return torch.expm1(away_T) - away_T

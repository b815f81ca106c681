"""How far adapters have gone: the norms of their weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.nn.shards import whole

_KINDS = {"lora_A": "lora_a_norm", "lora_B": "lora_b_norm", "lora_magnitude": "lora_magnitude_norm"}
"""Part of a tensor's name → the metric; the up-projections (B) start at 0."""


def adapter_norms(trained: Mapping[str, Tensor]) -> dict[str, float]:
    """Of all tensors of a kind together, Euclidean; empty where there is no adapter."""
    found = {}
    for mark, metric in _KINDS.items():
        tensors = [one.detach() for name, one in trained.items() if mark in name]
        if tensors:
            found[metric] = float(whole(torch.nn.utils.get_total_norm(tensors)))
    return found

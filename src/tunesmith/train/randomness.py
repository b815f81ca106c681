"""The state of every random generator that a training draws from: Python's and torch's.

NumPy's global one is used by nothing here, so it is neither seeded nor kept.
"""

import random
from typing import Any

import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def capture(device: str) -> dict[str, Tensor]:
    """As tensors, so that they can be kept without pickle."""
    version, words, gauss = random.getstate()
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def mark(device: str) -> dict[str, Tensor]:
    """What passes over the model draw from, torch's alone: cheap enough for each step."""
    state = {"torch": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def rewind(state: dict[str, Tensor], device: str) -> None:
    """To a mark."""
    torch.set_rng_state(state["torch"])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"], device)


def restore(state: dict[str, Tensor], device: str) -> None:
    version, *words = state["python"].tolist()
    gauss: list[Any] = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    torch.set_rng_state(state["torch"].clone())
    if device.startswith("cuda") and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)

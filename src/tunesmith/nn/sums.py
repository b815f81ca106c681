"""Two numbers for each tensor, by which a changed weight is found without a second copy."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_BLOCK = 1 << 22
_TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of a sum, against the root of the sum of squares times that of how many there are."""
Sums = tuple[float, float]


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, Sums]:
    return {name: _sums(tensor) for name, tensor in tensors.items()}


def first_changed(folder: Path, expected: Mapping[str, Sums]) -> str | None:
    """The first tensor of a folder whose sums are not those expected; others are passed over."""
    for name, tensor in _tensors(folder):
        if name in expected and not _is_near(tensor, expected[name]):
            return name
    return None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names: Iterable[str] = file.keys()
            for name in names:
                yield name, file.get_tensor(name)


def _sums(tensor: Tensor) -> Sums:
    total, squares = 0.0, 0.0
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        exact = block.double()
        total += float(exact.sum())
        squares += float(exact.square().sum())
    return total, squares


def _is_near(tensor: Tensor, expected: Sums) -> bool:
    total, squares = _sums(tensor)
    tolerance = _TOLERANCES.get(tensor.dtype, 0.0)
    room = tolerance * max(1.0, (expected[1] * tensor.numel()) ** 0.5)
    near = abs(total - expected[0]) <= room
    return near and abs(squares - expected[1]) <= tolerance * max(1.0, expected[1])

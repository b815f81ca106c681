"""Whether a job's results will find room, asked before its first step and told in numbers."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tunesmith.errors import FailureClass, JobFailure

BESIDE_BYTES = 1 << 20
"""Tokenizer, configuration, records."""
OPTIMIZER_BYTES = 8
"""Of a trained parameter: two moments in fp32."""


@dataclass(frozen=True)
class Wanted:
    """Bytes on the disk, about."""

    artifact: int
    checkpoint: int

    @classmethod
    def by(cls, trained: Iterable[Tensor]) -> "Wanted":
        tensors = list(trained)
        weights = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in tensors)
        moments = sum(tensor.numel() for tensor in tensors) * OPTIMIZER_BYTES
        return cls(weights + BESIDE_BYTES, weights + moments + BESIDE_BYTES)


def check(folder: Path, wanted: Wanted) -> str | None:
    """A warning where the model fits but no checkpoint beside it.

    Raises JobFailure(disk_full) where the model itself can't fit.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted.artifact:
        raise full(folder, wanted)
    if free < wanted.artifact + wanted.checkpoint:
        return (
            f"the disk has {_mb(free)} left; a checkpoint and the model want "
            f"{_mb(wanted.artifact + wanted.checkpoint)}: there may be no checkpoint to go on from"
        )
    return None


def full(folder: Path, wanted: Wanted) -> JobFailure:
    """The failure of a job whose model has no room."""
    free = shutil.disk_usage(folder).free
    return JobFailure(
        FailureClass.DISK_FULL,
        f"no room for the finished model: it wants about {_mb(wanted.artifact)}, the disk that "
        f"holds {folder} has {_mb(free)} left",
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"

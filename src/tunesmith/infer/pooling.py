"""A text as one vector: the model's last hidden states, pooled. T rows of a chunk, D hidden."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.errors import ServerError

Pooling = Literal["mean", "last", "first"]
_FLAGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "first",
}
_NAMES: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last", "last": "last", "cls": "first"}


class Pooled:
    """Reads the hidden states of a prompt; its sum, or one row of it, is kept."""

    kind: Literal["logits", "hidden"] = "hidden"

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum_D: Tensor | None = None

    def read(self, start: int, rows: Tensor) -> None:
        rows_TD = rows.detach().float().cpu()
        if start == 0:
            self._sum_D = torch.zeros(rows_TD.shape[-1], dtype=torch.float64)
        assert self._sum_D is not None, "a prompt is read from its start"
        if self._pooling == "mean":
            self._sum_D += rows_TD.double().sum(0)
        elif self._pooling == "last":
            self._sum_D = rows_TD[-1].double()
        elif start == 0:
            self._sum_D = rows_TD[0].double()

    def vector(self, dimensions: int | None = None) -> Tensor:
        """Of length one, in fp32, so that a mean needs no divisor; of its first `dimensions` where
        they are given. Raises ServerError where it is not a number."""
        assert self._sum_D is not None, "the prompt has been read"
        kept_D = self._sum_D[:dimensions]
        if not bool(kept_D.isfinite().all()):
            raise ServerError("the model's output is not a number (broken weights?)")
        length: Tensor = kept_D.norm().clamp(min=1e-12)
        return (kept_D / length).float()


def own_pooling(folder: Path) -> Pooling:
    """What a model's folder says, as sentence-transformers writes it; the mean where it is silent.

    Raises nothing: a setting that cannot be read is none.
    """
    modules = _read(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict) and str(module.get("type", "")).endswith(".Pooling"):
            path = (folder / str(module.get("path", ""))).resolve()
            if path.is_relative_to(folder.resolve()):
                return _named(_read(path / "config.json"))
    return "mean"


def _named(config: Any) -> Pooling:
    if not isinstance(config, dict):
        return "mean"
    mode = config.get("pooling_mode")
    if isinstance(mode, str) and mode in _NAMES:
        return _NAMES[mode]
    return next((pooling for flag, pooling in _FLAGS.items() if config.get(flag) is True), "mean")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size < 1 << 20 else None
    except (OSError, ValueError, RecursionError):
        return None

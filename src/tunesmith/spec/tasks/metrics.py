"""What a job measured, under the names that the contract of the tasks gives it."""

from collections.abc import Mapping
from typing import Any

_OWN = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
"""Of a step, beside its metrics."""
_BARE = ("reward/", "kl_divergence", "episode_length")
"""How names begin that the contract gives without `train/`."""


def contract_metrics(kind: str, told: Mapping[str, Any]) -> dict[str, float]:
    """Of an event of type `kind` that tells `told`: `train/…`, `eval/…`, or a bare name.

    Nothing, where it is not an event of a step or an evaluation.
    """
    if kind == "step":
        found = {name: told.get(name) for name in _OWN} | dict(told.get("metrics") or {})
        named = {_of_training(name): value for name, value in found.items()}
    elif kind == "evaluated":
        found = dict(told.get("metrics") or {})
        named = {f"eval/{name.removeprefix('eval_')}": value for name, value in found.items()}
    else:
        return {}
    return {name: float(value) for name, value in named.items() if value is not None}


def _of_training(name: str) -> str:
    return name if name.startswith(_BARE) else f"train/{name}"

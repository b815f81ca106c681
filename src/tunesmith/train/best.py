"""The best step of a training, by its evaluations: when to stop early, and which weights stay."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.language import Model
from tunesmith.spec.train import Best

_KEPT = "best"


@dataclass
class Record:
    """Kept in every checkpoint."""

    step: int = 0
    value: float | None = None
    """None before the first evaluation."""
    misses: int = 0
    """Evaluations since, that were no better."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Watch:
    """Over the evaluations of one training."""

    wanted: Best
    model: Model
    record: Record = field(default_factory=Record)
    _weights: dict[str, Tensor] = field(default_factory=dict)

    def take(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this evaluation is the best so far. Raises JobFailure where it lacks the metric;
        one that was no finite number counts as a miss."""
        value = metrics.get(self.wanted.metric)
        if value is None and "eval_loss" in metrics and self.record.value is None:
            raise JobFailure(
                FailureClass.USER_ERROR,
                f"the evaluation has no {self.wanted.metric!r} to choose the best step by",
                f"it has {', '.join(sorted(metrics))}",
            )
        if value is None or not self._is_better(value):
            self.record.misses += 1
            return False
        self.record = Record(step, value, metrics=dict(metrics))
        if self.wanted.keep:
            own = self.model.weights()
            self._weights = {name: one.detach().clone() for name, one in own.items()}
        return True

    @property
    def is_out_of_patience(self) -> bool:
        return self.wanted.patience is not None and self.record.misses >= self.wanted.patience

    def settle(self) -> bool:
        """Put the best weights in place. Whether there were any."""
        if self._weights:
            self.model.load_weights(self._weights)
        return bool(self._weights)

    def state(self) -> dict[str, Any]:
        return asdict(self.record)

    def kept(self) -> dict[str, Tensor]:
        return {f"{_KEPT}/{name}": tensor for name, tensor in self._weights.items()}

    def restore(self, state: Mapping[str, Any], kept: Mapping[str, Tensor]) -> None:
        self.record = Record(**state)
        own, prefix = self.model.weights(), f"{_KEPT}/"
        self._weights = {
            name.removeprefix(prefix): tensor.to(own[name.removeprefix(prefix)].device, copy=True)
            for name, tensor in kept.items()
            if name.startswith(prefix)
        }

    def sentence(self) -> str:
        named = f"{self.wanted.metric} {self.record.value:.4g}"
        return f"the best evaluation was that of step {self.record.step}, {named}"

    def _is_better(self, value: float) -> bool:
        before = self.record.value
        if before is None:
            return True
        gain = value - before if self.wanted.is_greater_better else before - value
        return gain > self.wanted.min_delta

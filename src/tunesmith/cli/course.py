"""What a job's events add up to so far: the numbers that a progress line shows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.spec.rewards import REWARD_MODEL

MAX_LOSSES = 20_000
"""Kept for the curve; beyond it every second one is dropped."""
STEPS_BEFORE_ETA = 5
_EVAL_LOSS = ("eval_loss", "loss")
_REWARD, _DIVERGENCE = "reward/mean", "kl_divergence"
_ANSWERED = {
    "eval_rougeL": "rougeL",
    "eval_exact_match": "exact",
    "eval_reward/mean": "eval reward",
}
"""Of an evaluation, what is shown beside its loss, or in its place."""
_PHASES = {
    "queued": "queued",
    "validated": "queued",
    "claimed": "starting",
    "running": "running",
    "reattached": "running",
    "requeued": "queued",
    "stopping": "stopping",
    "paused": "paused",
    "resumed": "queued",
    "succeeded": "completed",
    "finished": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "stopped": "stopped",
}


@dataclass
class Course:
    """Feed it a trainer's events, or a job's (`{"type", "data"}`), in order, with `take`."""

    phase: str = "waiting"
    step: int = 0
    start_step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    eta_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    reward: float | None = None
    divergence: float | None = None
    """In nats a token, of reinforcement."""
    rewards: list[float] = field(default_factory=list)
    answered: dict[str, float] = field(default_factory=dict)
    trial: str | None = None
    """Whose step the last one was."""
    is_over: bool = False
    error: str | None = None
    hint: str | None = None
    artifact: str | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Add one event; fields that are missing or of another kind are passed over."""
        kind, fields = words_of(event)
        self.phase = _PHASES.get(kind, self.phase)
        self.is_over = self.is_over or kind in {"succeeded", "failed", "cancelled", "finished"}
        match kind:
            case "started":
                self._start(fields)
            case "step":
                self._advance(fields)
            case "evaluated":
                self._judge(fields.get("metrics"))
            case "failed":
                self.error = _text(fields.get("message", fields.get("error")))
                self.hint = _text(fields.get("hint"))
            case "finished" | "succeeded":
                self.artifact = _text(fields.get("artifact")) or self.artifact
                self.eta_seconds = 0.0

    @property
    def curve(self) -> tuple[str, list[float]]:
        """What is to grow or to fall, by name: the loss of reinforcement says nothing."""
        return ("reward", self.rewards) if self.rewards else ("loss", self.losses)

    @property
    def share(self) -> float:
        """0 to 1."""
        if self.phase == "completed":
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def _start(self, fields: Mapping[str, Any]) -> None:
        self.phase = "running"
        self.start_step = self.step = _whole(fields.get("start_step")) or 0
        self.total_steps = _whole(fields.get("total_steps")) or self.total_steps

    def _advance(self, fields: Mapping[str, Any]) -> None:
        self.phase = "running" if self.phase in {"waiting", "queued", "starting"} else self.phase
        self.step = _whole(fields.get("step")) or self.step
        self.total_steps = _whole(fields.get("total_steps")) or self.total_steps
        self._follow(_text(fields.get("trial")))
        self.loss = _number(fields.get("loss"))
        self.learning_rate = _number(fields.get("learning_rate"))
        self.tokens_per_second = _number(fields.get("tokens_per_second"))
        self.peak_memory_bytes = _whole(fields.get("peak_memory_bytes"))
        is_known = self.step - self.start_step >= STEPS_BEFORE_ETA
        self.eta_seconds = _number(fields.get("eta_seconds")) if is_known else None
        _add(self.losses, self.loss)
        metrics = fields.get("metrics")
        told = metrics if isinstance(metrics, Mapping) else {}
        self.reward, self.divergence = _number(told.get(_REWARD)), _number(told.get(_DIVERGENCE))
        _add(self.rewards, self.reward)

    def _judge(self, metrics: Any) -> None:
        if not isinstance(metrics, Mapping):
            return
        if not metrics.keys().isdisjoint(_EVAL_LOSS):
            self.eval_loss = _number(metrics.get("eval_loss", metrics.get("loss")))
        found = {word: _number(metrics.get(name)) for name, word in _ANSWERED.items()}
        self.answered |= {word: value for word, value in found.items() if value is not None}

    def _follow(self, trial: str | None) -> None:
        """The losses of a reward model that was trained first are no beginning of the policy's."""
        if self.trial == REWARD_MODEL and trial is None:
            self.losses.clear()
            self.eval_loss = None
        self.trial = trial


def words_of(event: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The type and the fields of either kind of event."""
    data = event.get("data")
    return str(event.get("type", "")), data if isinstance(data, Mapping) else event


def _add(values: list[float], value: float | None) -> None:
    if value is not None:
        values.append(value)
        if len(values) > MAX_LOSSES:
            del values[::2]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None

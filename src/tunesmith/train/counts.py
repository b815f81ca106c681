"""What a training has done so far."""

from dataclasses import dataclass, field

ETA_FROM = 5
"""Steps timed before an end is foretold."""
ETA_SPAN = 50
"""Steps that the mean duration looks back on."""


@dataclass
class Counts:
    """What has been done so far, kept in every checkpoint."""

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    samples: int = 0
    skipped_updates: int = 0
    clipped_steps: int = 0
    """Steps of which the gradient was longer than `max_grad_norm`."""
    bad_steps: int = 0
    """In a row, that changed no weight."""
    timed_steps: int = 0
    step_seconds: float = 0.0
    """Moving mean."""
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""

    def end_step(self, loss: float | None, seconds: float, *, is_updated: bool) -> None:
        """`loss` is None where it was no finite number."""
        self.step += 1
        self.loss = loss
        self.bad_steps = 0 if is_updated else self.bad_steps + 1
        self.timed_steps += 1
        weight = 1 / min(self.timed_steps, ETA_SPAN)
        self.step_seconds += weight * (seconds - self.step_seconds)

    @property
    def clipped_share(self) -> float:
        """Of all steps so far."""
        return round(self.clipped_steps / max(1, self.step), 6)

    def seconds_for(self, steps: int) -> float | None:
        """How long so many more steps will take; None before that can be told."""
        if self.timed_steps < ETA_FROM:
            return None
        return round(max(0, steps) * self.step_seconds, 3)

"""Events on their way out: one JSON object a line, ASCII only, never NaN."""

import json
import math
import os
import sys

from tunesmith.spec.pipe import (
    Checkpointed,
    Evaluated,
    Failed,
    Finished,
    Notice,
    Probed,
    Replanned,
    Started,
    Step,
    Stopped,
    TrainerEvent,
)


class Report:
    """Writes events to a descriptor. Raises BrokenPipeError where nobody reads any more."""

    def __init__(self, descriptor: int, is_heard: bool = True) -> None:
        """One that is not heard tells of a failure only."""
        self._descriptor, self._is_heard = descriptor, is_heard

    def send(self, event: TrainerEvent) -> None:
        if not self._is_heard and not isinstance(event, Failed):
            return
        text = json.dumps(event.model_dump(mode="json"), ensure_ascii=True, allow_nan=False)
        rest = memoryview(text.encode("ascii") + b"\n")
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        print(line_of(event), file=sys.stderr, flush=True)


def line_of(event: TrainerEvent) -> str:
    """The same for the log, in words."""
    match event:
        case Step():
            loss = "not finite" if event.loss is None else f"{event.loss:.4f}"
            left = "" if event.eta_seconds is None else f", {event.eta_seconds:,.0f} s left"
            more = "".join(f", {name} {value:.4g}" for name, value in event.metrics.items())
            return (
                f"step {event.step}/{event.total_steps}{_of(event.trial)}: loss {loss}{more}, "
                f"learning rate {event.learning_rate:.3g}, "
                f"{event.tokens_per_second:,.0f} tokens/s{left}"
            )
        case Started():
            return (
                f"started: {event.trainable_parameters:,} of {event.parameters:,} parameters, "
                f"{event.total_steps} steps, from step {event.start_step}, {event.plan!r}"
            )
        case Replanned():
            return f"from here on: {event.plan!r}"
        case Probed():
            size = f"{event.samples:,} samples, {event.tokens:,} tokens"
            memory = f"{event.peak_memory_bytes:,} bytes"
            return f"probed: a step of {size} takes {event.seconds:.3g} s and up to {memory}"
        case Evaluated():
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
            return f"step {event.step}{_of(event.trial)}: {metrics}"
        case Checkpointed():
            return f"step {event.step}: checkpoint {event.path}, {event.size_bytes:,} bytes"
        case Notice():
            return f"{event.level}: {event.message}"
        case Finished():
            return f"finished at step {event.step}: {event.artifact}"
        case Stopped():
            return f"stopped at step {event.step}"
        case Failed():
            return f"failed ({event.failure_class}): {event.message} ({event.hint})"


def _of(trial: str | None) -> str:
    return "" if trial is None else f", {trial}"


def finite(number: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return number if math.isfinite(number) else None


def finite_only(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

"""What a job will take, from its specification, its model's shapes and a look at its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from tunesmith.hub import needs
from tunesmith.hub.folder import ModelFolder
from tunesmith.spec.estimate import Estimate, Measure
from tunesmith.spec.rewards import ExactMatch
from tunesmith.spec.train import (
    Kto,
    Preference,
    Pretrain,
    Reinforcing,
    Sweepable,
    TrainSpec,
    reward_training,
)

GUESSED_FLOPS = {False: 40e9, True: 50e12}
"""Useful ones in a second, of a CPU and of a GPU, before any job has run here."""
START_SECONDS = 2.0
FULL, FROZEN, FORWARD = 6, 4, 2
"""Operations for each weight and token: all passes; all but the gradients of the weights; one."""
MOST = 1 << 62


@dataclass(frozen=True)
class Ran:
    """How fast a job ran here, in its last steps."""

    is_gpu: bool
    flops: float
    """Useful ones in a second."""


def foretell(
    spec: TrainSpec,
    model: ModelFolder,
    measure: Measure,
    history: Sequence[Ran],
    is_gpu: bool,
    rewarding: Sequence[ModelFolder] = (),
) -> Estimate:
    """`history` is of jobs of any kind; those on the same kind of device count. `rewarding` are
    models that completions are scored by."""
    if isinstance(spec, Sweepable) and spec.sweep is not None:
        alone = spec.configurations().values()
        each = [foretell(one, model, measure, history, is_gpu) for one in alone]
        return _together(spec, model, each, is_gpu)
    first = reward_training(spec)
    if first is not None:
        before = foretell(first, model, measure, history, is_gpu)
        taught = spec.model_copy(update={"rewards": (ExactMatch(),)})
        after = foretell(taught, model, measure, history, is_gpu)
        both = _together(spec, model, [after, before], is_gpu)
        peak = needs.of(spec, model, is_gpu, rewarding).memory_bytes
        return both.model_copy(update={"peak_memory_bytes": peak})
    samples, tokens, labels = _epoch(spec, measure)
    steps = _steps(spec, samples)
    share = min(steps * _samples_a_step(spec) / max(1, samples), spec.optim.epochs)
    known = [one.flops for one in history if one.is_gpu == is_gpu and one.flops > 0]
    speed = median(known) if known else GUESSED_FLOPS[is_gpu]
    told: Literal["history", "guess"] = "history" if known else "guess"
    work = tokens * (share * flops_a_token(spec, model) + _reference(spec, model, share))
    return Estimate(
        parameters=needs.parameters(spec, model),
        trainable_parameters=needs.trained(spec, model),
        rows=measure.rows,
        samples=samples,
        steps=steps,
        tokens=min(round(tokens * share), MOST),
        label_tokens=min(round(labels * share), MOST),
        longest_sample_tokens=measure.longest,
        is_exact=measure.is_exact,
        seconds=round(START_SECONDS + work / speed, 1),
        seconds_from=told,
        peak_memory_bytes=needs.of(spec, model, is_gpu, rewarding).memory_bytes,
        checkpoint_bytes=needs.checkpoint_bytes(spec, model),
        disk_bytes=needs.disk_bytes(spec, model),
    )


def _together(
    spec: TrainSpec, model: ModelFolder, each: Sequence[Estimate], is_gpu: bool
) -> Estimate:
    """Of several configurations in one process, which starts once."""
    starts = START_SECONDS * (len(each) - 1)
    return each[0].model_copy(
        update={
            "trainable_parameters": needs.trained(spec, model),
            "steps": sum(one.steps for one in each),
            "tokens": min(sum(one.tokens for one in each), MOST),
            "label_tokens": min(sum(one.label_tokens for one in each), MOST),
            "seconds": round(sum(one.seconds for one in each) - starts, 1),
            "peak_memory_bytes": needs.of(spec, model, is_gpu).memory_bytes,
            "checkpoint_bytes": needs.checkpoint_bytes(spec, model),
            "disk_bytes": needs.disk_bytes(spec, model),
        }
    )


def flops_a_token(spec: TrainSpec, model: ModelFolder) -> float:
    """Of a training step; attention over long rows is not counted."""
    is_frozen = not isinstance(spec, Pretrain) and spec.lora is not None
    return (FROZEN if is_frozen else FULL) * float(needs.parameters(spec, model))


def _epoch(spec: TrainSpec, measure: Measure) -> tuple[int, float, float]:
    """Samples, tokens and labels of one epoch; completions at their longest, drawing them not
    counted."""
    held_out = max(1, round(spec.holdout * measure.rows)) if spec.holdout else 0
    rows = (measure.rows - held_out) * measure.usable
    tokens, labels = rows * measure.tokens, rows * measure.labels
    if isinstance(spec, Pretrain):
        return max(1, math.ceil(tokens / spec.sequence_length)), tokens, labels
    if isinstance(spec, Reinforcing):
        drawn = rows * spec.num_generations * spec.max_completion_length * spec.update_epochs
        completions = rows * spec.num_generations * spec.update_epochs
        return max(1, round(completions)), tokens * spec.update_epochs + drawn, drawn
    if isinstance(spec, Kto):
        return max(1, round(rows * measure.answers)), tokens, labels
    return max(1, round(rows)), tokens - rows * measure.shared, labels


def _steps(spec: TrainSpec, samples: int) -> int:
    an_epoch = math.ceil(samples / _samples_a_step(spec))
    steps = max(1, math.ceil(round(spec.optim.epochs * an_epoch, 6)))
    return steps if spec.optim.max_steps is None else min(steps, spec.optim.max_steps)


def _samples_a_step(spec: TrainSpec) -> int:
    return spec.optim.batch_size * spec.optim.gradient_accumulation_steps * spec.run.devices


def _reference(spec: TrainSpec, model: ModelFolder, share: float) -> float:
    """Operations a token of what is measured once before the first step, over the first epoch."""
    if not isinstance(spec, Preference | Kto):
        return 0.0
    return min(share, 1.0) * FORWARD * needs.parameters(spec, model)

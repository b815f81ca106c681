"""One step on the longest samples, before the first one counts: its time and its memory."""

import heapq
import time
from collections.abc import Callable
from typing import Any

import torch

from tunesmith.nn.language import Model
from tunesmith.spec.pipe import Plan, Probed
from tunesmith.train import randomness
from tunesmith.train.batches import Source
from tunesmith.train.memory import peak_bytes
from tunesmith.train.objective import Objective

LOOK = 1024
"""Samples, in the order of the first epoch, among which the longest are looked for."""
MOMENTS_BYTES = 8
"""For each trained parameter: what the first update sets aside."""


def probe(
    model: Model,
    source: Source[Any],
    objective: Objective[Any],
    plan: Plan,
    samples: int,
    stand_ins: Callable[[list[Any]], list[Any]] = list,
) -> Probed:
    """Forward and backward over `samples` samples, twice; the second time is measured.

    Leaves weights and random numbers as they were, also where it fails; the source has to be opened
    anew.
    """
    longest = stand_ins(_longest(source, samples))
    before = randomness.capture(plan.device)
    try:
        seconds = min(_step(model, objective, longest) for _ in range(2))
    finally:
        randomness.restore(before, plan.device)
        for parameter in model.trainable().values():
            parameter.grad = None
    trained = sum(parameter.numel() for parameter in model.trainable().values())
    return Probed(
        samples=len(longest),
        tokens=sum(sample.tokens for sample in longest),
        seconds=round(seconds, 4),
        peak_memory_bytes=peak_bytes(plan.device) + MOMENTS_BYTES * trained,
    )


def _longest(source: Source[Any], samples: int) -> list[Any]:
    source.open(0)
    pulled: list[Any] = []
    while len(pulled) < max(LOOK, samples) and (sample := source.pull()) is not None:
        pulled.append(sample)
    if not pulled:
        raise source.nothing_usable()
    return heapq.nlargest(samples, pulled, key=lambda sample: sample.tokens)


def _step(model: Model, objective: Objective[Any], samples: list[Any]) -> float:
    began, units = time.perf_counter(), objective.units(samples)
    for measured in objective.passes(samples):
        (measured.loss / units).backward()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for parameter in model.trainable().values():
        parameter.grad = None
    return time.perf_counter() - began

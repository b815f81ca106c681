"""Supervised fine-tuning and pretraining: every label is to become likely, each weighs the same."""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tunesmith.data.fit import Cut
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel
from tunesmith.train.batches import Sample
from tunesmith.train.objective import Ground, Measured, Objective
from tunesmith.train.source import Notes, fitting

MOST_NATS = 700.0
"""The exponential of more is no finite number."""


@dataclass(frozen=True)
class SampleReader:
    """A row is a sample."""

    renderer: Renderer
    cut: Cut
    samples_a_row: int = 1

    def read(self, row: Row, place: int, notes: Notes) -> Sample | None:
        fitted = fitting(self.renderer, row, self.cut, notes)
        return None if fitted is None else Sample.of(array("i", fitted.ids), fitted.mask)


@dataclass(frozen=True)
class LabelLoss(Objective[Sample]):
    """The mean over a step's labels of -log p(label | what stands before it)."""

    names = ("token_accuracy",)
    """Of evaluations only: while training, the likeliest tokens are not looked for."""
    ground: Ground[LanguageModel]

    def units(self, samples: Sequence[Sample]) -> int:
        return sum(sample.labels for sample in samples)

    def passes(self, samples: Sequence[Sample]) -> Iterator[Measured]:
        for part in self.ground.parts(samples):
            batch = flatten([(one.ids, one.mask) for one in part], self.ground.device)
            if torch.is_grad_enabled():
                loss = self.ground.model.loss_sum(batch)
                yield Measured(loss, torch.zeros(1, 2, dtype=torch.float64))
            else:
                loss, hits = self.ground.model.grades(batch)
                yield Measured(loss, torch.stack((hits, hits.new_tensor(batch.labels)))[None])

    def evaluated(self, loss: float, units: int) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, MOST_NATS)), "tokens": units}

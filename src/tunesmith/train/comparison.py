"""The tuned model against the one it began as, on rows that neither was trained on.

N rows, drawn by seed from the held-out ones. The interval is a percentile bootstrap over rows, in
pairs (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.nn.language import Model
from tunesmith.train.batches import Interrupted, Sized, Source
from tunesmith.train.objective import Objective

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Losses of rows, before and after. `low` and `high` bound the mean change."""

    rows: int
    before: float
    after: float
    low: float
    high: float
    improved: float
    """Share of the rows whose loss fell."""

    @property
    def change(self) -> float:
        return self.after - self.before

    def metrics(self) -> dict[str, float]:
        return {
            "base_loss": self.before,
            "tuned_loss": self.after,
            "loss_change": self.change,
            "loss_change_low": self.low,
            "loss_change_high": self.high,
            "rows_improved": self.improved,
        }

    def sentence(self) -> str:
        return (
            f"{self.rows:,} held-out rows, base against tuned: loss {self.before:.4g} → "
            f"{self.after:.4g}, a change of {self.change:+.4g} ({LEVEL:.0%} interval "
            f"{self.low:+.4g} to {self.high:+.4g}); {self.improved:.0%} of them are better"
        )


def draw(source: Source[Any], most: int, seed: int) -> list[Any]:
    """Up to `most` samples, each as likely as the others (Vitter 1985, algorithm R)."""
    source.open(0)
    dice, seen = random.Random(seed), 0
    drawn: list[Any] = []
    while (sample := source.pull()) is not None:
        seen += 1
        if len(drawn) < most:
            drawn.append(sample)
        elif (place := dice.randrange(seen)) < most:
            drawn[place] = sample
    return drawn


@dataclass(frozen=True)
class Pace:
    """What goes on meanwhile."""

    should_stop: Callable[[], bool]
    tell: Callable[[int, int], None]
    """Rows measured and to be measured."""


@dataclass(frozen=True)
class Compared:
    """What the model made of some samples before its first update, and what it makes of them."""

    model: Model
    objective: Objective[Any]
    samples: Sequence[Sized]
    before: Sequence[float]
    """Losses; in every checkpoint."""
    pace: Pace

    @classmethod
    def of(
        cls,
        model: Model,
        objective: Objective[Any],
        samples: Sequence[Sized],
        known: Sequence[float] | None,
        pace: Pace,
    ) -> "Compared | None":
        """`known` is of the checkpoint gone on from; None measures now, and raises Interrupted at a
        stop. None where nothing was measured at the start."""
        before = _losses(model, objective, samples, pace) if known is None else known
        if not before or len(before) != len(samples):
            return None
        return cls(model, objective, samples, before, pace)

    def found(self, seed: int) -> Comparison | None:
        """How it stands now. Raises Interrupted at a stop."""
        after = _losses(self.model, self.objective, self.samples, self.pace)
        return compare(self.before, after, seed)


def _losses(
    model: Model, objective: Objective[Any], samples: Sequence[Sized], pace: Pace
) -> list[float]:
    """Each sample's own, without dropout."""
    found: list[float] = []
    model.eval()
    try:
        for sample in samples:
            if pace.should_stop():
                raise Interrupted
            found.append(_loss(objective, sample))
            pace.tell(len(found), len(samples))
    finally:
        model.train()
    return found


def _loss(objective: Objective[Any], sample: Sized) -> float:
    with torch.no_grad():
        total = sum(float(measured.loss) for measured in objective.passes([sample]))
    return total / objective.units([sample])


def compare(before_N: Sequence[float], after_N: Sequence[float], seed: int) -> Comparison | None:
    """None where there is no row, or a loss that is no finite number."""
    before, after = torch.tensor(before_N).double(), torch.tensor(after_N).double()
    change = after - before
    count = len(change)
    if not count or not bool(change.isfinite().all()):
        return None
    dice = torch.Generator().manual_seed(seed)
    places = torch.randint(count, (RESAMPLES, count), generator=dice)
    means = change[places].mean(1)
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    return Comparison(
        rows=count,
        before=float(before.mean()),
        after=float(after.mean()),
        low=low,
        high=high,
        improved=float((change < 0).double().mean()),
    )

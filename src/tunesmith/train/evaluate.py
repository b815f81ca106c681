"""The loss on rows that are not trained on, and whatever else the method tells of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.train.answers import Exam
from tunesmith.train.batches import Feed, Interrupted
from tunesmith.train.objective import Objective, means
from tunesmith.train.parallel import Group
from tunesmith.train.report import finite_only


@dataclass(frozen=True)
class Evaluation:
    objective: Objective[Any]
    feed: Callable[[], Feed[Any]]
    """One at the beginning of the validation set."""
    exam: Exam | None = None

    def metrics(self, group: Group, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """All named `eval_…`; None where a stop came meanwhile.

        No random number is drawn: the model is to be out of training mode.
        """
        try:
            told = measure(self.objective, self.feed(), group, should_stop)
            told |= self.exam.marks(group) if self.exam else {}
        except Interrupted:
            return None
        return finite_only({f"eval_{name}": value for name, value in told.items()})


def measure(
    objective: Objective[Any], feed: Feed[Any], group: Group, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """The loss and what is told beside it, over one epoch of `feed`. Raises Interrupted."""
    loss, units = 0.0, 0
    totals_M2 = torch.zeros(len(objective.names), 2, dtype=torch.float64)
    while feed.epoch == 0:
        if should_stop():
            raise Interrupted
        samples = feed.take()
        units += objective.units(samples)
        with torch.no_grad():
            for measured in objective.passes(samples):
                loss += float(measured.loss)
                totals_M2 += measured.totals_M2.cpu()
    loss, *numbers = group.add_up(loss, *totals_M2.flatten().tolist())
    mean = loss / max(units, 1)
    told = {"loss": mean, **objective.told(means(objective.names, numbers))}
    return told | objective.evaluated(mean, units)

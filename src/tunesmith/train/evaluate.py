"""The loss on rows that are not trained on, and whatever else the method tells of them."""

from collections.abc import Callable
from typing import Any

import torch

from tunesmith.train.batches import Feed, Interrupted
from tunesmith.train.objective import Objective, means
from tunesmith.train.parallel import Group
from tunesmith.train.report import finite_only


def evaluate(
    objective: Objective[Any], feed: Feed[Any], group: Group, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """`eval_` metrics over one epoch of `feed`; None where a stop came meanwhile.

    No random number is drawn: the model is to be out of training mode.
    """
    loss, units = 0.0, 0
    totals_M2 = torch.zeros(len(objective.names), 2, dtype=torch.float64)
    try:
        while feed.epoch == 0:
            if should_stop():
                return None
            samples = feed.take()
            units += objective.units(samples)
            with torch.no_grad():
                for measured in objective.passes(samples):
                    loss += float(measured.loss)
                    totals_M2 += measured.totals_M2.cpu()
    except Interrupted:
        return None
    loss, *numbers = group.add_up(loss, *totals_M2.flatten().tolist())
    mean = loss / max(units, 1)
    told = {"loss": mean, **objective.told(means(objective.names, numbers))}
    told |= objective.evaluated(mean, units)
    return finite_only({f"eval_{name}": value for name, value in told.items()})

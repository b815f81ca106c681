"""The loss on rows that are not trained on."""

import math
from collections.abc import Callable

import torch

from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel
from tunesmith.spec.pipe import Plan
from tunesmith.train.batches import Feed, Interrupted, split
from tunesmith.train.parallel import Group
from tunesmith.train.report import finite_only

MOST_NATS = 700.0
"""The exponential of more is no finite number."""


def evaluate(
    model: LanguageModel,
    feed: Feed,
    plan: Plan,
    group: Group,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss and perplexity per label over one epoch of `feed`; None where a stop came meanwhile.

    No random number is drawn, and the model is left in training mode.
    """
    loss, labels = 0.0, 0.0
    model.eval()
    try:
        while feed.epoch == 0:
            if should_stop():
                return None
            for part in split(group.share(feed.take()), plan.micro_batch_tokens):
                batch = flatten([(one.ids, one.mask) for one in part], plan.device)
                with torch.no_grad():
                    loss += float(model.loss_sum(batch))
                labels += batch.labels
    except Interrupted:
        return None
    finally:
        model.train()
    loss, labels = group.add_up(loss, labels)
    mean = loss / max(labels, 1)
    perplexity = math.exp(min(mean, MOST_NATS))
    return finite_only(
        {"eval_loss": mean, "eval_perplexity": perplexity, "eval_tokens": int(labels)}
    )

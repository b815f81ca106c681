"""What becomes of a step that memory did not suffice for: it is made again, in smaller passes.

The same samples make the same update, whatever passes they run in (`batches.split`), so the
effective batch and the mean over it stay. What was begun leaves nothing behind.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from tunesmith.errors import JobFailure
from tunesmith.nn.memory import give_back_freed_memory
from tunesmith.train.batches import Sized, split
from tunesmith.train.objective import Objective
from tunesmith.train.parallel import Group
from tunesmith.train.standing import Standing


@dataclass(frozen=True)
class Narrowed:
    """What was changed, and what the step is made of now."""

    samples: Sequence[Any]
    sentence: str
    detail: dict[str, int]


def narrow(
    standing: Standing,
    group: Group,
    samples: Sequence[Sized],
    lay_anew: Callable[[], Sequence[Any]],
) -> Narrowed | None:
    """Halve the tokens of a pass until the step has more passes; None where there is no more.

    All processes come to the same, each by itself: each knows the whole step.
    """
    before, passes = standing.micro_batch_tokens, _passes(group, samples, standing)
    while standing.micro_batch_tokens > 1:
        standing.narrow(standing.micro_batch_tokens // 2)
        laid = lay_anew()
        now = _passes(group, laid, standing)
        if now > passes:
            after = standing.micro_batch_tokens
            return Narrowed(
                laid,
                f"passes have up to {after:,} tokens from here on, not {before:,}: {now} in this "
                f"step, not {passes}, which make the same update",
                {"micro_batch_tokens": after, "before": before, "passes": now},
            )
    standing.narrow(before)
    return None


def may_narrow(standing: Standing, group: Group, objective: Objective[Any]) -> bool:
    """Whether a process may break its passes off by itself: no other waits for it within them."""
    if group.size == 1:
        return True
    return standing.plan.parallel != "fsdp" and not objective.is_exchanging


def _passes(group: Group, samples: Sequence[Sized], standing: Standing) -> int:
    parts = (split(share, standing.micro_batch_tokens) for share in group.shares(samples))
    return len(list(chain.from_iterable(parts)))


def free_memory() -> None:
    """Of what a pass that was broken off held. Its exception has to be gone."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def hopeless(fault: JobFailure) -> JobFailure:
    """The same, where passes cannot be smaller."""
    return JobFailure(
        fault.failure_class, f"{fault}; a pass of one sample does not fit either", fault.hint
    )

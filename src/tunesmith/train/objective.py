"""What a method makes of a step's samples: a number to bring down, and what is told beside it.

M metrics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.nn import language
from tunesmith.train.batches import S, Sized, split
from tunesmith.train.parallel import Group
from tunesmith.train.standing import Standing

S_contra = TypeVar("S_contra", bound=Sized, contravariant=True)
Model = TypeVar("Model", bound=language.Model)


@dataclass(frozen=True)
class Measured:
    """What one pass over the model came to."""

    loss: Tensor
    """A sum over the units of the pass; differentiable."""
    totals_M2: Tensor
    """Of each metric its sum and what that is over, in float64."""


class Objective(Protocol[S_contra]):
    """How a method is trained. The loop knows of no other difference between methods."""

    names: ClassVar[tuple[str, ...]] = ()
    """Of the metrics, as in `Measured.totals_M2`."""
    is_exchanging: ClassVar[bool] = False
    """Whether processes speak with each other within `passes`: none may then leave it by itself."""

    @property
    def beside(self) -> Mapping[str, nn.Parameter]:
        """What is trained beside the model; the method's feed keeps it for checkpoints."""
        return {}

    def units(self, samples: Sequence[S_contra]) -> int:
        """What the loss of a step is the mean over: labels, or pairs. Above 0."""

    def passes(self, samples: Sequence[S_contra]) -> Iterator[Measured]:
        """One after the other over this process's share of a step's samples.

        Gradients are taken between one pass and the next, where they are wanted.
        """

    def told(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a step, from the means of those that there were."""
        return dict(means)

    def evaluated(self, loss: float, units: int) -> dict[str, float]:
        """What a whole evaluation says beside its loss and metrics."""
        return {}


@dataclass(frozen=True)
class Ground(Generic[Model]):
    """What every objective stands on."""

    model: Model
    device: str
    standing: Standing
    group: Group

    @property
    def micro_batch_tokens(self) -> int:
        """Of a pass, as it stands now."""
        return self.standing.micro_batch_tokens

    def parts(self, samples: Sequence[S]) -> Iterator[list[S]]:
        """This process's share, in passes. Where processes hold parts of the model, those that have
        fewer passes than others keep step when theirs are done: with gradients or without, as where
        the last is asked for."""
        mine = split(self.group.share(samples), self.micro_batch_tokens)
        yield from mine
        if self.standing.plan.parallel == "fsdp":
            shares = self.group.shares(samples)
            most = max(len(split(one, self.micro_batch_tokens)) for one in shares)
            for _ in range(most - len(mine)):
                self.model.idle()


def totals(*values: Tensor) -> Tensor:
    """`Measured.totals_M2` of metrics that each have a value for every unit."""
    pairs = [
        torch.stack((one.detach().double().sum(), one.new_tensor(one.numel()).double()))
        for one in values
    ]
    return torch.stack(pairs) if pairs else torch.zeros(0, 2, dtype=torch.float64)


def means(names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    """From sums and what they are over, in turn; one over nothing is left out."""
    pairs = zip(names, numbers[0::2], numbers[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}

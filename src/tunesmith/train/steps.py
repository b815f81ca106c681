"""Where a loop takes its steps from, whatever makes them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from tunesmith.train.batches import S_co


class Steps(Protocol[S_co]):
    """Where a loop takes its steps from. A step never reaches over the end of an epoch."""

    @property
    def epoch(self) -> int: ...

    @property
    def epoch_samples(self) -> int | None:
        """Exact, once the first epoch has ended."""

    @property
    def is_between_epochs(self) -> bool: ...

    @property
    def progress(self) -> float:
        """Epochs done, with the share of the one under way."""

    @property
    def steps_an_epoch(self) -> int: ...

    @property
    def told(self) -> Mapping[str, float]:
        """Metrics of what the last step was taken from."""

    def take(self) -> Sequence[S_co]:
        """The samples of the next step, at least one. Raises what the source says is wrong."""

    def lay_anew(self, samples: Sequence[Any]) -> Sequence[S_co]:
        """Those of the last step, cut for the passes that there are now."""

    def lines(self, since: Mapping[str, Any]) -> list[int]:
        """Of the file, those that the steps since a `state` were made of, as far as that is known.

        Nothing that counts is changed, but rows are read again.
        """

    def state(self) -> dict[str, Any]:
        """In JSON's types: where the next step is taken from."""

    def kept(self) -> Mapping[str, Tensor]:
        """Tensors that belong to `state`."""

    def seek(self, state: dict[str, Any], kept: Mapping[str, Tensor]) -> None:
        """The inverse; `kept` may hold others too."""

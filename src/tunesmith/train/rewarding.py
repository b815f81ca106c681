"""What a method of reinforcement asks of whatever rewards its completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.data.rows import Row


@dataclass(frozen=True)
class Judged:
    """A completion, with all that may be looked at to reward it."""

    row: Row
    """That it was asked by; what the answer should have been: `data.asked.Asked.reference`."""
    prompt: list[dict[str, Any]]
    """The messages that were answered; of a raw prompt, one of the user."""
    completion: str
    completion_ids: tuple[int, ...]


class Scorer(Protocol):
    """One source of rewards."""

    def score(self, judged: Sequence[Judged]) -> list[float]:
        """One number for each completion, not yet weighed. Raises JobFailure where it cannot."""


class Rewarder(Protocol):
    """All sources of a job."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, for metrics; all different."""

    @property
    def weights(self) -> tuple[float, ...]:
        """What each counts in the total."""

    def score(self, judged: Sequence[Judged]) -> list[list[float]]:
        """One list for each completion, with a finite value for each name, not yet weighed.

        Raises JobFailure where a source cannot be asked.
        """

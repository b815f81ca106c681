"""Completions compared with what should be answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.asked import asked
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.rewards import ExactMatch
from tunesmith.train.rewarding import Judged


@dataclass(frozen=True)
class Matching:
    """See `Rewarder`."""

    sources: tuple[ExactMatch, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.kind for source in self.sources)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(source.weight for source in self.sources)

    def score(self, judged: Sequence[Judged]) -> list[list[float]]:
        return [[_matches(one)] * len(self.sources) for one in judged]


def _matches(judged: Judged) -> float:
    reference = asked(judged.row).reference
    if reference is None:
        raise JobFailure(
            FailureClass.DATA_ERROR,
            f"line {judged.row.line}: no reference to compare a completion with",
            'give the row a "reference", or an answer',
        )
    return float(judged.completion.strip() == reference.strip())

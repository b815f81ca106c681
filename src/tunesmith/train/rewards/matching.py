"""Completions compared with what should be answered."""

from collections.abc import Sequence

from tunesmith.data.asked import asked
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.train.rewarding import Judged


class ExactMatching:
    """See `Scorer`."""

    def score(self, judged: Sequence[Judged]) -> list[float]:
        return [float(one.completion.strip() == reference_of(one).strip()) for one in judged]


def reference_of(judged: Judged) -> str:
    """Raises JobFailure(data_error) where the row has none."""
    reference = asked(judged.row).reference
    if reference is None:
        raise JobFailure(
            FailureClass.DATA_ERROR,
            f"line {judged.row.line}: no reference to compare a completion with",
            'give the row a "reference", or an answer',
        )
    return reference

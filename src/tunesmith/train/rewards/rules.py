"""Completions judged by rules: last numbers, patterns, JSON schemas, words shared in order."""

from collections.abc import Callable, Sequence

from tunesmith.data.rouge import rouge_l
from tunesmith.data.verify import Pattern, Schema, last_number
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.rewards import JsonSchema, Numeric, Regex
from tunesmith.train.rewarding import Judged
from tunesmith.train.rewards.matching import reference_of


class NumberMatching:
    """See `Scorer`."""

    def __init__(self, source: Numeric) -> None:
        self._source = source

    def score(self, judged: Sequence[Judged]) -> list[float]:
        return [float(self._is_near(one)) for one in judged]

    def _is_near(self, judged: Judged) -> bool:
        wanted, found = last_number(reference_of(judged)), last_number(judged.completion)
        if wanted is None:
            raise JobFailure(
                FailureClass.DATA_ERROR,
                f"line {judged.row.line}: its reference holds no number to compare with",
                "write the number in digits, or use another reward",
            )
        room = max(self._source.tolerance, self._source.relative_tolerance * abs(wanted))
        return found is not None and abs(found - wanted) <= room


class PatternMatching:
    """See `Scorer`."""

    def __init__(self, source: Regex, warn: Callable[[str, str], None]) -> None:
        self._pattern, self._warn, self._has_warned = Pattern(source.pattern), warn, False

    def score(self, judged: Sequence[Judged]) -> list[float]:
        return [float(self._is_in(one.completion)) for one in judged]

    def _is_in(self, text: str) -> bool:
        try:
            return self._pattern.is_in(text)
        except (TimeoutError, MemoryError):
            if not self._has_warned:
                self._warn(
                    "reward_slow",
                    "the pattern of a reward took too long to match and counts as not found; "
                    "nested repeats such as (a+)+ are slow",
                )
            self._has_warned = True
            return False


class SchemaMatching:
    """See `Scorer`."""

    def __init__(self, source: JsonSchema) -> None:
        self._schema = Schema(source.json_schema)

    def score(self, judged: Sequence[Judged]) -> list[float]:
        return [float(self._schema.holds(one.completion)) for one in judged]


class WordSharing:
    """See `Scorer`."""

    def score(self, judged: Sequence[Judged]) -> list[float]:
        return [rouge_l(one.completion, reference_of(one)) for one in judged]

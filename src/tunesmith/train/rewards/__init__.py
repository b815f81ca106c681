"""What rewards completions, one file a kind of source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.verify import check_rules
from tunesmith.errors import FailureClass, JobFailure, ValidationError
from tunesmith.nn.language import LanguageModel
from tunesmith.spec.pipe import Plan
from tunesmith.spec.rewards import (
    ExactMatch,
    JsonSchema,
    Numeric,
    PythonFunction,
    Regex,
    RewardModel,
    RewardService,
    RewardSource,
    Rouge,
    TrainedModel,
)
from tunesmith.train.rewarding import Judged, Rewarder, Scorer
from tunesmith.train.rewards.function import FunctionScoring
from tunesmith.train.rewards.matching import ExactMatching
from tunesmith.train.rewards.rules import (
    NumberMatching,
    PatternMatching,
    SchemaMatching,
    WordSharing,
)
from tunesmith.train.rewards.scoring import ModelScoring
from tunesmith.train.rewards.service import Service

TRAINED = "\0trained"
"""No name that a specification can give."""


@dataclass(frozen=True)
class Bench:
    """What sources are opened with."""

    folders: Mapping[str, str]
    """Of reward models, by their names in the specification; of one that was trained first, by
    `TRAINED`."""
    plan: Plan
    format: str
    """Of the rows."""
    warn: Callable[[str, str], None]
    networks: Sequence[str] = ()
    """See `Inputs`."""
    policy: LanguageModel | None = None
    should_stop: Callable[[], bool] = lambda: False
    """Called often while something is waited for."""


@dataclass(frozen=True)
class Together:
    """Several sources as one. See `Rewarder`."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    scorers: tuple[Scorer, ...]

    def score(self, judged: Sequence[Judged]) -> list[list[float]]:
        columns = [scorer.score(judged) for scorer in self.scorers]
        return [list(scores) for scores in zip(*columns, strict=True)]


def open_rewarders(sources: Sequence[RewardSource], bench: Bench) -> Rewarder:
    """Raises JobFailure."""
    try:
        check_rules(sources)
    except ValidationError as error:
        raise JobFailure(FailureClass.USER_ERROR, error.message) from error
    return Together(
        names=_names([source.kind for source in sources]),
        weights=tuple(source.weight for source in sources),
        scorers=tuple(_open(source, bench) for source in sources),
    )


def _open(source: RewardSource, bench: Bench) -> Scorer:
    match source:
        case ExactMatch():
            return ExactMatching()
        case Numeric():
            return NumberMatching(source)
        case Regex():
            return PatternMatching(source, bench.warn)
        case JsonSchema():
            return SchemaMatching(source)
        case Rouge():
            return WordSharing()
        case RewardModel():
            return _scoring(source.model, bench)
        case RewardService():
            return Service(source, bench.networks, bench.should_stop)
        case PythonFunction():
            return FunctionScoring(source, bench.should_stop)
        case TrainedModel():
            return _scoring(TRAINED, bench)


def _scoring(name: str, bench: Bench) -> ModelScoring:
    folder = bench.folders[name]
    return ModelScoring(folder, bench.plan, bench.format, bench.warn, bench.policy)


def _names(kinds: Sequence[str]) -> tuple[str, ...]:
    """Each kind; from its second source on with a number."""
    before = [kinds[:at].count(kind) for at, kind in enumerate(kinds)]
    return tuple(
        kind if not count else f"{kind}_{count + 1}"
        for kind, count in zip(kinds, before, strict=True)
    )

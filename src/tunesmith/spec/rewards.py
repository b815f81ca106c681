"""What a completion may be rewarded for. Pure data."""

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.spec.strict import Name, Strict


class Weighed(Strict):
    weight: float = Field(1.0, ge=-1000, le=1000)
    """What the reward counts in the sum of all; below 0 it is a penalty."""


class ExactMatch(Weighed):
    """1 where the completion is the row's reference, outer white space aside, else 0."""

    kind: Literal["exact_match"] = "exact_match"


class RewardModel(Weighed):
    """The score of a reward model, which stays as it is."""

    kind: Literal["model"] = "model"
    model: Name
    """One made with `method: reward`, or any that gives one number for a sequence."""


RewardSource = Annotated[ExactMatch | RewardModel, Field(discriminator="kind")]


def models_in(sources: tuple[RewardSource, ...]) -> tuple[str, ...]:
    """Names of the reward models, each once."""
    named = (source.model for source in sources if isinstance(source, RewardModel))
    return tuple(dict.fromkeys(named))

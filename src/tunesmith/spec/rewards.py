"""What a completion may be rewarded for. Pure data."""

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.spec.strict import Name, Strict

REWARD_MODEL = "reward_model"
"""In an artifact: the folder of the reward model that was trained first."""


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


class TrainedModel(Weighed):
    """The score of a reward model that the job trains first, on what its own rows compare."""

    kind: Literal["trained"] = "trained"
    learning_rate: float = Field(1e-4, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)
    batch_size: int = Field(4, ge=1, le=65_536)
    center: float = Field(0.0, ge=0, le=1000)


RewardSource = Annotated[ExactMatch | RewardModel | TrainedModel, Field(discriminator="kind")]


def models_in(sources: tuple[RewardSource, ...]) -> tuple[str, ...]:
    """Names of the reward models, each once."""
    named = (source.model for source in sources if isinstance(source, RewardModel))
    return tuple(dict.fromkeys(named))

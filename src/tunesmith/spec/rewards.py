"""What a completion may be rewarded for. Pure data."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tunesmith.spec.strict import Name, Strict

REWARD_MODEL = "reward_model"
"""In an artifact: the folder of the reward model that was trained first."""


MAX_SCHEMA_CHARS = 65_536


class Weighed(Strict):
    weight: float = Field(1.0, ge=-1000, le=1000)
    """What the reward counts in the sum of all; below 0 it is a penalty."""


class ExactMatch(Weighed):
    """1 where the completion is the row's reference, outer white space aside, else 0."""

    kind: Literal["exact_match"] = "exact_match"


class Numeric(Weighed):
    """1 where the completion's last number is the reference's last number, else 0."""

    kind: Literal["numeric"] = "numeric"
    tolerance: float = Field(1e-6, ge=0, le=1e9)
    """How far apart they may be."""
    relative_tolerance: float = Field(0.0, ge=0, le=1)
    """The same as a share of the reference; the larger one holds."""


class Regex(Weighed):
    """1 where the pattern is found in the completion, else 0. A match that takes longer than a
    second is none."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, max_length=1000)


class JsonSchema(Weighed):
    """1 where the completion, white space around it aside, is JSON that the schema allows."""

    kind: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any]
    """Draft 2020-12, with no reference to elsewhere."""

    @field_validator("json_schema")
    @classmethod
    def _check_size(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
            raise ValueError(f"is over {MAX_SCHEMA_CHARS:,} characters of JSON")
        return schema


class Rouge(Weighed):
    """ROUGE-L of the completion against the reference, from 0 to 1."""

    kind: Literal["rouge"] = "rouge"


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


RewardSource = Annotated[
    ExactMatch | Numeric | Regex | JsonSchema | Rouge | RewardModel | TrainedModel,
    Field(discriminator="kind"),
]


def models_in(sources: tuple[RewardSource, ...]) -> tuple[str, ...]:
    """Names of the reward models, each once."""
    named = (source.model for source in sources if isinstance(source, RewardModel))
    return tuple(dict.fromkeys(named))

"""What a completion may be rewarded for. Pure data."""

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tunesmith.spec.strict import Name, Strict

REWARD_MODEL = "reward_model"
"""In an artifact: the folder of the reward model that was trained first."""


MAX_SCHEMA_CHARS = 65_536
_NO_ADDRESS = frozenset(' \\^`{|}<>"')


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


class RewardService(Weighed):
    """The score that a service gives: POST {"items": [{"prompt", "completion", "reference",
    "metadata"}, …]} is answered with {"scores": [number, …]}."""

    kind: Literal["url"] = "url"
    url: str = Field(min_length=1, max_length=2048)
    batch_size: int = Field(32, ge=1, le=1024)
    """Completions in one request."""
    timeout_seconds: float = Field(30, gt=0, le=600)
    """For one try."""
    tries: int = Field(5, ge=1, le=20)
    """Of one request, where the service is away, too slow, or answers 408, 425, 429 or 5xx."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_plain = not (parts.username or parts.password or parts.fragment or parts.port == 0)
        except ValueError:
            is_plain = False
        is_plain = is_plain and url.isprintable() and not set(url) & _NO_ADDRESS
        if not is_plain or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "has to be a plain address such as https://example.com/score, without name, "
                "password or #fragment"
            )
        return url


class PythonFunction(Weighed):
    """What `reward(prompt, completion, reference, metadata)` returns, run where it can only
    compute: no network, no file, no other process."""

    kind: Literal["python"] = "python"
    code: str = Field(min_length=1, max_length=65_536)
    """That defines the function. `prompt` is a list of messages, `reference` a text or None,
    `metadata` what the row has."""
    timeout_seconds: float = Field(5, gt=0, le=60)
    """For one completion."""
    memory_mb: int = Field(512, ge=64, le=8192)


class TrainedModel(Weighed):
    """The score of a reward model that the job trains first, on what its own rows compare."""

    kind: Literal["trained"] = "trained"
    learning_rate: float = Field(1e-4, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)
    batch_size: int = Field(4, ge=1, le=65_536)
    center: float = Field(0.0, ge=0, le=1000)


RewardSource = Annotated[
    ExactMatch
    | Numeric
    | Regex
    | JsonSchema
    | Rouge
    | RewardModel
    | RewardService
    | PythonFunction
    | TrainedModel,
    Field(discriminator="kind"),
]


def functions_bytes(sources: tuple[RewardSource, ...]) -> int:
    """Memory that functions may take, beside the process that asks them."""
    return sum(one.memory_mb << 20 for one in sources if isinstance(one, PythonFunction))


def services_in(sources: tuple[RewardSource, ...]) -> tuple[str, ...]:
    """Addresses of services, each once."""
    named = (source.url for source in sources if isinstance(source, RewardService))
    return tuple(dict.fromkeys(named))


def models_in(sources: tuple[RewardSource, ...]) -> tuple[str, ...]:
    """Names of the reward models, each once."""
    named = (source.model for source in sources if isinstance(source, RewardModel))
    return tuple(dict.fromkeys(named))

"""Which documents of a corpus are trained on, and how often, by what their metadata say."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from tunesmith.spec.strict import Strict

MAX_WEIGHT = 1000.0
MetaField = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""Of a row's `metadata`."""
MAX_VALUE_LENGTH = 1000


def _plain(value: Any) -> Any:
    """One sentence, where a union would tell of each of its kinds."""
    is_plain = isinstance(value, bool | int | float | str)
    if not is_plain or len(value if isinstance(value, str) else repr(value)) > MAX_VALUE_LENGTH:
        raise ValueError(f"has to be a text of up to {MAX_VALUE_LENGTH} characters, or a number")
    return value


Value = Annotated[bool | int | float | str, BeforeValidator(_plain)]
"""Compared as text: 1, 1.0 and "1" are one, as are true and "true"."""
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT)]
"""How often a document is read in an epoch, on average: 2.5 is twice, and half of the time once
more; 0 leaves it out."""


class Weights(Strict):
    field: MetaField = Field(description="of a row's metadata")
    values: Annotated[
        dict[Annotated[str, StringConstraints(max_length=MAX_VALUE_LENGTH)], Weight],
        Field(min_length=1, max_length=1000),
    ] = Field(description="value → weight; of a list of values the heaviest counts")
    default: Weight = Field(1.0, description="of documents with another value, or with none")


class Sampling(Strict):
    where: Annotated[
        dict[MetaField, Annotated[tuple[Value, ...], Field(min_length=1, max_length=1000)]],
        Field(max_length=16),
    ] = Field(
        {},
        description="only documents whose metadata have one of these values, in each of these "
        "fields; of a list of values one is enough",
    )
    weights: Weights | None = Field(
        None, description="how often a document is read in an epoch, on average"
    )

    @field_validator("where", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One value stands for a list of one."""
        if not isinstance(value, dict):
            return value
        return {
            name: one if isinstance(one, list | tuple) else (one,) for name, one in value.items()
        }

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.where and self.weights is None:
            raise ValueError("sampling says nothing: give where, or weights")
        return self

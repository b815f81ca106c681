"""How strictly a request's parts are read."""

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """A part of a request: types as they are, unknown fields ignored as OpenAI's API does."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

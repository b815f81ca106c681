"""The shape that everything asked for and kept has in common: frozen, and no unknown field."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
"""A path, a registered name or a hub id, before it is resolved."""

"""What a door hands to the house: a training request, whatever contract it came by."""

from dataclasses import dataclass, field
from typing import Any

from tunesmith.spec.train import TrainSpec


@dataclass(frozen=True)
class Request:
    """A training request in the one vocabulary; `field_names` are the contract's own."""

    spec: TrainSpec
    request: dict[str, Any]
    """As it was asked for, for `config`."""
    route: str
    output_dir: str | None = None
    priority: int = 0
    label: str | None = None
    resume_from: str | None = None
    idempotency_key: str | None = None
    field_names: dict[str, str] = field(default_factory=dict)

    def name(self, part: str) -> str:
        return self.field_names.get(part, part)

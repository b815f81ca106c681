"""A training configuration that was read, whichever words it was written in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.spec.train import AnySpec


@dataclass(frozen=True)
class Configuration:
    spec: AnySpec
    asked: dict[str, Any]
    """The whole of it in its own words, defaults filled in."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Place in the specification → the key as it was written, where that is another."""
    task_type: str | None = None
    """None: it was written in the specification's own words."""
    output_dir: str | None = None
    folder: str = ""
    """Of the model, in the place that its results go to."""

    def name(self, place: str) -> str:
        """What a place is called by who wrote the configuration."""
        return self.spelled.get(place, place)

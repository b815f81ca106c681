"""What is said to the process that downloads a snapshot, and what it answers."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from tunesmith.spec.strict import Strict


class Wanted(Strict):
    """One file, as the hub describes it."""

    name: str
    size: int
    sha256: str | None = None


class Order(Strict):
    repo: str
    commit: str
    files: list[Wanted]
    cache: Path
    endpoint: str
    token: str = Field("", repr=False)


class Outcome(Strict):
    kind: Literal["done", "again", "final", "disk_full"]
    """`again`: another try may go better."""
    message: str = ""

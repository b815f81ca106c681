"""Which schedules this very code has played, a line a batch, so that hours of it can be broken off.

What is kept counts for nothing once the store, the states of its rows or the simulator is another.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prove.sim.worker import Played

HOME = Path(__file__).parents[2]
PLAYED = ("src/tunesmith/store", "src/tunesmith/spec/records.py", "prove/sim")
BESIDE = ("tests/store_fixtures.py",)
Batch = tuple[str, int, int]
"""Database, first seed, the seed after the last."""


@dataclass(frozen=True)
class Sum:
    """What came of a batch. Every schedule can be played again by its seed."""

    schedules: int
    acts: int
    broken: tuple[tuple[int, str], ...] = ()
    """Seeds, each with its first fault."""

    @classmethod
    def of(cls, played: Sequence[Played]) -> "Sum":
        broken = tuple((one.seed, one.faults[0]) for one in played if one.faults)
        return cls(len(played), sum(one.acts for one in played), broken)


@dataclass
class Tally:
    path: Path | None
    """None keeps nothing."""
    code: str = field(default_factory=lambda: digest())
    _known: dict[Batch, Sum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text("utf-8").splitlines():
            told = json.loads(line)
            if told["code"] == self.code:
                broken = tuple((seed, fault) for seed, fault in told["broken"])
                batch: Batch = tuple(told["batch"])
                self._known[batch] = Sum(batch[2] - batch[1], told["acts"], broken)

    def known(self, database: str, seeds: range) -> Sum | None:
        return self._known.get((database, seeds.start, seeds.stop))

    def keep(self, database: str, seeds: range, found: Sum) -> None:
        if self.path is None:
            return
        batch = [database, seeds.start, seeds.stop]
        told = {"code": self.code, "batch": batch, "acts": found.acts, "broken": found.broken}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


def digest() -> str:
    """Of the sources that decide what a schedule does."""
    places = [path for name in PLAYED for path in _sources(HOME / name)]
    found = hashlib.sha256()
    for path in sorted([*places, *(HOME / name for name in BESIDE)]):
        found.update(path.relative_to(HOME).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:32]


def _sources(place: Path) -> list[Path]:
    return [place] if place.is_file() else list(place.rglob("*.py"))

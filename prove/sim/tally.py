"""Which schedules this very code has played, a line a batch, so that hours of it can be broken off.

What is kept counts for nothing once the store, its vocabulary or the simulator is another.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from prove.sim.worker import Played

HOME = Path(__file__).parents[2]
PLAYED = ("src/tunesmith/store", "src/tunesmith/spec", "src/tunesmith/errors.py", "prove/sim")
BESIDE = ("tests/store_fixtures.py",)
Batch = tuple[str, int, int]
"""Database, first seed, the seed after the last."""


@dataclass
class Tally:
    path: Path | None
    """None keeps nothing."""
    code: str = field(default_factory=lambda: digest())
    _known: dict[Batch, list[Played]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text("utf-8").splitlines():
            told = json.loads(line)
            if told["code"] == self.code:
                played = [
                    Played(seed, tuple(faults), acts) for seed, faults, acts in told["played"]
                ]
                self._known[tuple(told["batch"])] = played  # type: ignore[index]

    def known(self, database: str, seeds: range) -> list[Played] | None:
        return self._known.get((database, seeds.start, seeds.stop))

    def keep(self, database: str, seeds: range, played: list[Played]) -> None:
        if self.path is None:
            return
        batch = [database, seeds.start, seeds.stop]
        line = json.dumps({"code": self.code, "batch": batch, "played": played})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def digest() -> str:
    """Of all sources that decide what a schedule does."""
    places = [path for name in PLAYED for path in _sources(HOME / name)]
    found = hashlib.sha256()
    for path in sorted([*places, *(HOME / name for name in BESIDE)]):
        found.update(path.relative_to(HOME).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _sources(place: Path) -> list[Path]:
    return [place] if place.is_file() else list(place.rglob("*.py"))

"""What a proof is given, and what it answers: figures, each beside its bar."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")
Progress = Callable[[int, int, str], None]
"""How much is done, of how much, and a word on it."""


@dataclass(frozen=True)
class Setting:
    """How hard, where, and with which dice."""

    folder: Path
    """Empty, for this proof alone."""
    seed: int = 1
    is_long: bool = False
    databases: tuple[str, ...] = ("sqlite", "postgresql")
    scale: float = 1.0
    """Of the counts: the tests run a small part."""
    record: Path | None = None
    """Of what was played, for a run that goes on where an earlier one was broken off."""

    def count(self, short: int, long: int) -> int:
        return max(1, round(self.scale * (long if self.is_long else short)))

    def dice(self, *names: object) -> random.Random:
        """Throws that depend on the seed and on what they are for."""
        return random.Random("/".join(map(str, (self.seed, *names))))

    def inner(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(parents=True)
        return place


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    bar: str
    came_out: str
    is_met: bool


@dataclass(frozen=True)
class Result:
    figures: tuple[Figure, ...]
    detail: dict[str, Any] = field(default_factory=dict)
    """For the report: counts, and every violation in a sentence."""

    @property
    def is_met(self) -> bool:
        return all(figure.is_met for figure in self.figures)


def none_of(what: str, found: Sequence[object], among: str = "") -> Figure:
    """A figure whose bar is zero."""
    return Figure(what, "0", f"{len(found)}{among and f' of {among}'}", not found)


def at_most(what: str, value: float, bar: float, unit: str = "s") -> Figure:
    return Figure(what, f"≤ {bar:g} {unit}", f"{value:.2f} {unit}", value <= bar)


def at_least(what: str, value: float, bar: float, unit: str = "") -> Figure:
    return Figure(what, f"≥ {bar:g} {unit}".strip(), f"{value:g} {unit}".strip(), value >= bar)


def join(results: Sequence[Result]) -> Result:
    figures = tuple(figure for result in results for figure in result.figures)
    detail: dict[str, Any] = {}
    for result in results:
        detail |= result.detail
    return Result(figures, detail)

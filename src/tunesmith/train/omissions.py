"""Rows that were left out or cut: how many, why, and the first lines of each kind."""

from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.render import Notice

MAX_LINES = 20
"""Line numbers kept of each kind."""

REASONS = {
    "overlong": "longer than max_length",
    "truncated": "cut to max_length",
    "masked": "without a token to learn from",
    "alike": "whose answers become the same tokens",
    "empty": "that ask nothing",
}


@dataclass
class Omissions:
    """Each reason's count and first line numbers, in the order met."""

    counts: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)
    notices: set[Notice] = field(default_factory=set)
    """What the renderer had to say about some row."""

    def add(self, reason: str, line: int) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        lines = self.lines.setdefault(reason, [])
        if len(lines) < MAX_LINES:
            lines.append(line)

    @property
    def dropped(self) -> int:
        return sum(count for reason, count in self.counts.items() if reason != "truncated")

    def sentence(self) -> str:
        """`3 rows longer than max_length (lines 4, 9, 12)`, and so on for each reason."""
        return "; ".join(self._phrase(reason) for reason in sorted(self.counts))

    def state(self) -> dict[str, Any]:
        return {reason: [count, *self.lines[reason]] for reason, count in self.counts.items()}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Omissions":
        return cls(
            {reason: row[0] for reason, row in state.items()},
            {reason: list(row[1:]) for reason, row in state.items()},
        )

    def _phrase(self, reason: str) -> str:
        count, lines = self.counts[reason], self.lines[reason]
        rows = "row" if count == 1 else "rows"
        word = "line" if count == 1 else "lines"
        more = ", …" if count > len(lines) else ""
        return f"{count:,} {rows} {REASONS[reason]} ({word} {', '.join(map(str, lines))}{more})"

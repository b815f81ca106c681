"""What is wrong with a configuration: which key, in which line, and what would be right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError as PydanticError

from tunesmith.errors import ValidationError

MAX_FAULTS = 20
_LONGEST = 80
"""Characters of a key that are repeated."""


@dataclass(frozen=True)
class Fault:
    message: str
    key: str = ""
    """As it was written; none where the message names it, or where it is about the whole."""
    line: int | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """As an error's details have it."""
        place: list[str | int] = ["line", self.line] if self.line is not None else []
        key = self.key[:_LONGEST]
        return {"loc": [*place, key] if key else place, "msg": self.message}

    def __str__(self) -> str:
        line = f"line {self.line}" if self.line is not None else ""
        place = ", ".join(filter(None, (line, self.key[:_LONGEST])))
        return f"{place}: {self.message}" if place else self.message


def refusal(faults: Sequence[Fault], name: str) -> ValidationError:
    """The first ones, by line; `name` is the file's."""
    found = sorted(faults, key=lambda fault: fault.line or 0)
    message = f"{name}: {found[0]}" if len(found) == 1 else f"{name} has {len(found)} faults"
    return ValidationError(message, details=[fault.entry for fault in found[:MAX_FAULTS]])


def faults_of(error: PydanticError) -> list[tuple[str, str]]:
    """Place, dotted, and what is wrong there; one for each place."""
    found: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"])
        found.setdefault(place, []).append(_worded(fault["type"], fault["msg"]))
    return [(place, "; or ".join(messages)) for place, messages in found.items()]


def _worded(kind: str, message: str) -> str:
    if kind == "missing":
        return "is missing"
    plain = message.removeprefix("Value error, ").replace("Input should be", "has to be")
    return plain[:1].lower() + plain[1:]

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
    for fault in told_by(error):
        place = ".".join(str(part) for part in fault["loc"])
        found.setdefault(place, []).append(_worded(fault))
    return [(place, "; or ".join(messages)) for place, messages in found.items()]


def told_by(error: PydanticError) -> list[dict[str, Any]]:
    """Its faults, but for that of a list which is too short since its items have faults."""
    told = [dict(fault) for fault in error.errors(include_url=False)]
    return [fault for fault in told if not _is_echo(fault, told)]


def _is_echo(fault: dict[str, Any], told: Sequence[dict[str, Any]]) -> bool:
    loc = fault["loc"]
    return fault["type"] == "too_short" and any(
        one["loc"][: len(loc)] == loc and one["loc"] != loc for one in told
    )


def plain(fault: dict[str, Any]) -> str:
    """What is wrong, in a few words."""
    if fault["type"] == "union_tag_not_found":
        return f"{fault['ctx']['discriminator']} is missing".replace("'", "")
    if fault["type"] == "union_tag_invalid":
        told = fault["ctx"]
        name, tags = (told[each].replace("'", "") for each in ("discriminator", "expected_tags"))
        return f"{name} {str(told['tag'])[:60]!r} is unknown; write one of {tags}"
    message: str = fault["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _worded(fault: dict[str, Any]) -> str:
    if fault["type"] == "missing":
        return "is missing"
    return plain(fault).replace("input should be", "has to be", 1)

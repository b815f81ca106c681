"""One sample of a data set, whatever format it stood in, and what is wrong where it is none."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tunesmith.errors import ValidationError
from tunesmith.spec.chat import Message

Format = Literal[
    "openai",
    "alpaca",
    "prompt_completion",
    "sharegpt",
    "text",
    "unpaired",
    "preference",
    "openai_preference",
    "scored",
    "prompts",
]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """What a row says of the adapter it is to train; what is None is the configuration's."""

    targets: tuple[str, ...] | None = None
    """Sorted."""
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One sample, whatever format it stood in.

    `line` counts from 1: the line of a .jsonl or .txt, the place in the array of a .json.
    A conversation fills `messages` (and `tools`), a raw pair `prompt` and `completion`
    (no template, the end token is appended), a plain document `text`. An answer that was judged
    has a `label`: whether it is wanted. A pair is the row of the chosen answer; `rejected` is the
    same with the other one, and `margin` how much better the chosen one is. A row that only asks
    has no answer; `reference` is what should be answered. `adapter` is the one that it is to train,
    where it names one.
    """

    line: int
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: bool | None = None
    rejected: "Row | None" = None
    margin: float | None = None
    reference: str | None = None
    adapter: RowAdapter | None = None
    metadata: Any = field(default=None, compare=False)
    """As the row has it: for whoever rewards its completions."""


class RowFault(ValidationError):
    """A row that cannot be used: which (`line`; 0 is the file as a whole), where in it, and why."""

    def __init__(self, line: int, reason: str, *, loc: str = "", unit: str = "line") -> None:
        where = f"{unit} {line}" if line else "the file"
        at = f", {loc}" if loc else ""
        entry: list[str | int] = [unit, line, loc] if loc else [unit, line]
        super().__init__(f"{where}{at}: {reason}", details=[{"loc": entry, "msg": reason}])
        self.line, self.reason, self.loc, self.unit = line, reason, loc, unit


class Wrong(Exception):
    """What is wrong inside a row, before its line is known."""

    def __init__(self, reason: str, loc: str = "") -> None:
        super().__init__(reason)
        self.reason, self.loc = reason, loc

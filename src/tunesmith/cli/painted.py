"""A row's tokens in a terminal: trained ones bright, the others dim, each told from the next."""

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from tunesmith.cli.terminal import show, tell
from tunesmith.cli.text import clean

if TYPE_CHECKING:
    from tuning_sdk import Preview, Token

_BRIGHT, _DIM, _UNDER, _OFF = "\x1b[1m", "\x1b[2m", "\x1b[4m", "\x1b[0m"
_OPEN, _CLOSE = "⟦", "⟧"
"""Around what is learnt, where there are no colours."""


def show_preview(found: "Preview") -> None:
    place = f"row {found.row}" + (f", line {found.line}" if found.line else "")
    template = f", template: {found.template}" if found.template else ""
    tell(f"{place}, {found.format}{template}")
    print("".join(painted(found.tokens, has_colours(sys.stdout))), flush=True)
    hidden = len(found.ids) - len(found.tokens)
    if hidden > 0:
        tell(f"… and {hidden:,} more tokens")
    show(f"{found.fate}: {found.length:,} tokens, {found.trained_tokens:,} of them learnt")
    if found.why:
        tell(found.why)


def has_colours(stream: object) -> bool:
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not is_plain and bool(getattr(stream, "isatty", lambda: False)())


def painted(tokens: Iterable["Token"], has_colours: bool) -> Iterator[str]:
    """Every second token is underlined, so that it is seen where one ends."""
    number = 0
    for weight, run in groupby(tokens, key=lambda token: token.weight):
        if not has_colours:
            text = "".join(map(readable, run))
            yield f"{_OPEN}{text}{_CLOSE}" if weight else text
            continue
        for token in run:
            style = (_BRIGHT if weight else _DIM) + (_UNDER if number % 2 else "")
            yield from _styled(readable(token), style)
            number += 1


def readable(token: "Token") -> str:
    """Nothing in it can steer the terminal; a newline is seen as one."""
    return clean(token.text.replace("\r", "␍").replace("\t", "→\t").replace("\n", "⏎\n"))


def _styled(text: str, style: str) -> Iterator[str]:
    """A style ends with its line, or it would run to the terminal's edge."""
    for part in text.splitlines(keepends=True):
        line = part.rstrip("\n")
        yield f"{style}{line}{_OFF}{part[len(line) :]}"

"""Words and numbers made fit for a terminal."""

import os
import unicodedata
from typing import TextIO

_KEPT = {"\n", "\t"}


def clean(text: str) -> str:
    """Without control characters, so that text from outside cannot steer the terminal.

    New lines and tabs stay; so do the joiners and marks that emoji and scripts need.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        for character in text
        if character in _KEPT or unicodedata.category(character) not in {"Cc", "Cs"}
    )


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can be drawn over: a terminal, and not the simplest kind."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def bytes_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(seconds: float | None) -> str:
    """`1:02:03`, `2:03`; a dash where it is not known."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def columns(rows: list[list[str]], headers: list[str]) -> str:
    """A table in plain text; widths count what a terminal shows, Korean and emoji included."""
    from rich.cells import cell_len

    table = [headers, *[[clean(cell).replace("\n", " ") for cell in row] for row in rows]]
    widths = [max(cell_len(row[index]) for row in table) for index in range(len(headers))]
    lines = [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join(lines)

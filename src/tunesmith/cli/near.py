"""The name that was probably meant."""

import difflib
from pathlib import Path


def listed(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def near_name(wanted: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    near = difflib.get_close_matches(wanted, known, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def names_in(folder: Path) -> list[str]:
    return [path.name for path in listed(folder)]

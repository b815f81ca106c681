"""The name that was probably meant."""

from pathlib import Path

from tunesmith.spec.near import near_name

__all__ = ["listed", "names_in", "near_name"]


def listed(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def names_in(folder: Path) -> list[str]:
    return [path.name for path in listed(folder)]

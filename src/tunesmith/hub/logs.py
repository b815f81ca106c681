"""The end of a log without reading all of it, and its number of lines, counted once."""

import threading
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 16
MAX_LINE = 64 << 10
"""Bytes of a line that are shown."""


@dataclass(frozen=True)
class _Counted:
    inode: int
    size: int
    lines: int


class Logs:
    """Remembers how many lines were counted up to where, so that only what is new is read."""

    def __init__(self) -> None:
        self._counted: dict[Path, _Counted] = {}
        self._gate = threading.Lock()

    def tail(self, path: Path, lines: int) -> tuple[list[str], int]:
        """The last `lines` lines (0: all), oldest first, and how many there are.

        Raises FileNotFoundError where nothing was written yet.
        """
        total = self._count(path)
        wanted = total if lines == 0 else min(lines, total)
        return [_shown(line) for line in _last(path, wanted)], total

    def _count(self, path: Path) -> int:
        stat = path.stat()
        with self._gate:
            known = self._counted.get(path)
        if known is None or known.inode != stat.st_ino or known.size > stat.st_size:
            known = _Counted(stat.st_ino, 0, 0)
        lines, size = known.lines, known.size
        with path.open("rb") as file:
            file.seek(size)
            while block := file.read(_BLOCK):
                lines += block.count(b"\n")
                size += len(block)
        with self._gate:
            if len(self._counted) > 10_000:
                self._counted.clear()
            self._counted[path] = _Counted(stat.st_ino, size, lines)
        return lines


def _last(path: Path, lines: int) -> list[bytes]:
    """Read blocks from the end until enough line ends were seen; an unfinished line waits."""
    if lines == 0:
        return []
    with path.open("rb") as file:
        end = file.seek(0, 2)
        blocks: list[bytes] = []
        seen = 0
        while end > 0 and seen <= lines:
            start = max(0, end - _BLOCK)
            file.seek(start)
            blocks.append(file.read(end - start))
            seen += blocks[-1].count(b"\n")
            end = start
    whole = b"".join(reversed(blocks))
    return whole.split(b"\n")[:-1][-lines:]


def _shown(line: bytes) -> str:
    """Text without control characters; a progress bar's rewrites are cut to the last."""
    text = line[-MAX_LINE:].decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]
    return "".join(char if char.isprintable() or char == "\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char if ord(char) > 0x9F else f"\\x{ord(char):02x}"

"""From a pipe to a log file that never outgrows its cap: its beginning and its end are kept."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Protocol

_BLOCK = 1 << 16


class CappedLog:
    """Append bytes to a file of at most `max_bytes`; in the middle, a line says what was left out.

    When the file is full, its first quarter and its last quarter are kept.
    """

    def __init__(self, path: Path, max_bytes: int, head: int | None = None, cut: int = 0) -> None:
        """`head` and `cut` are what an earlier one of the same file ended with."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._max = max_bytes
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self.head = head
        """Bytes of the beginning that stay, once something was cut."""
        self.cut = cut

    def write(self, block: bytes) -> None:
        """Raises OSError where the disk is full; the caller goes on without the log."""
        step = max(1, self._max // 4)
        for start in range(0, len(block), step):
            self._append(block[start : start + step])

    def line(self, text: str) -> None:
        """A line of our own; lost where the disk is full."""
        with contextlib.suppress(OSError):
            self.write(text.encode("utf-8", "replace") + b"\n")

    def close(self) -> None:
        self._file.close()

    def _append(self, piece: bytes) -> None:
        if self._size + len(piece) > self._max:
            self._shrink()
        while piece:
            written = self._file.write(piece)
            self._size += written
            piece = piece[written:]

    def _shrink(self) -> None:
        """A new file takes the old one's place; where that fails, the old one is left as it was."""
        quarter = self._max // 4
        with self._path.open("rb") as old:
            head = old.read(quarter if self.head is None else self.head)
            old.seek(max(len(head), self._size - quarter))
            tail = old.read()
        if self.head is None:
            head = head[: head.rfind(b"\n") + 1] or head
        tail = tail[tail.find(b"\n") + 1 :] or tail
        cut = self.cut + self._size - len(head) - len(tail)
        part = self._path.with_name(self._path.name + ".part")
        try:
            part.write_bytes(head + _marker(cut) + tail)
            fresh = part.open("ab", buffering=0)
            os.replace(part, self._path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file, self._size = fresh, fresh.tell()
        self.head, self.cut = len(head), cut


def _marker(cut: int) -> bytes:
    return f"[log truncated here: about {cut} bytes left out]\n".encode()


class Log(Protocol):
    """Where a trainer's words go."""

    def write(self, block: bytes) -> None: ...
    def line(self, text: str) -> None: ...
    def close(self) -> None: ...


async def pump(stream: asyncio.StreamReader, log: Log) -> None:
    """Carry everything to the log until the writers are gone; a full disk drops, never blocks."""
    while block := await stream.read(_BLOCK):
        with contextlib.suppress(OSError):
            log.write(block)

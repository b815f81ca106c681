"""Bytes and names kept on the database's disk, given up when it is full, so that it can be told.

The end of a running job, a cancel and a checkpoint's row still find room then. It lies in pieces:
a disk can also run out of names (inodes), and each piece gives one back.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

PIECES = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What a disk has left."""

    bytes: int
    names: int | None
    """Inodes; None where the file system does not count them."""

    @classmethod
    def of(cls, folder: Path) -> "Room":
        found = os.statvfs(folder)
        return cls(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None)

    def has(self, size_bytes: int, names: int) -> bool:
        return self.bytes >= size_bytes and (self.names is None or self.names >= names)


class Reserve:
    """`size_bytes` held in a folder of its own; 0 bytes hold nothing.

    It is given up piece by piece, since others write to the disk too: a checkpoint that is being
    written takes all it can get, and gives it back when it fails.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder = folder
        self._piece = -(-size_bytes // PIECES)
        self.size_bytes = self._piece * PIECES

    def hold(self) -> bool:
        """Take what is missing of it. False, with no more held than before, where no room is."""
        if not self._piece:
            return True
        before = set(self._held())
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for place in self._places():
                self._take(place)
        except OSError as error:
            _log.warning("no room for the reserve at %s: %s", self._folder, error)
            for place in set(self._held()) - before:
                place.unlink(missing_ok=True)
            return False
        return True

    def release(self, pieces: int = 1) -> bool:
        """Give some of it back to the disk. Whether there was any left to give."""
        held = self._held()[:pieces]
        for place in held:
            place.unlink(missing_ok=True)
        return bool(held)

    def _places(self) -> list[Path]:
        return [self._folder / f"{number:02}" for number in range(PIECES)]

    def _held(self) -> list[Path]:
        return [place for place in self._places() if place.exists()]

    def _take(self, place: Path) -> None:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, self._piece)
            os.posix_fallocate(descriptor, 0, self._piece)
        finally:
            os.close(descriptor)

"""A path as it was looked at: where it leads, and a stamp that changes with what is there."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

SETTLED_NS = 50_000_000
"""A file that changes twice within a tick of the kernel's clock keeps its stamp: one that was
changed so lately is not remembered."""

Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Trace:
    """Where a path leads, and what was found there."""

    path: str
    real: str
    stamp: Stamp

    @classmethod
    def of(cls, path: str | Path) -> "Trace":
        """Raises OSError."""
        text = str(path)
        descriptor = os.open(text, os.O_PATH | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            real = os.readlink(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return cls(text, real, _stamp(found))

    @property
    def is_settled(self) -> bool:
        return time.time_ns() - max(self.stamp[3:]) > SETTLED_NS

    def holds(self) -> bool:
        return Trace.of(self.path) == self

    def holds_in_place(self) -> bool:
        """Enough, and faster, where it is no link and its folder's own trace holds."""
        return _stamp(os.lstat(self.path)) == self.stamp


def _stamp(found: os.stat_result) -> Stamp:
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (found.st_dev, found.st_ino, found.st_size, *times)

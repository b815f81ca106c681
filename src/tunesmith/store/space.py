"""A full disk: told as what it is, noticed, lived with on a reserve, healed when there is room."""

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import NoSpaceError
from tunesmith.store.reserve import PIECES, Reserve, Room

FULL_BYTES = 1 << 20
"""A disk with less left than this counts as full: a commit and its journal want room."""
FULL_NAMES = 8
_log = logging.getLogger(__name__)


@contextmanager
def told_as_no_space(disk: str = "the disk that holds the workspace") -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into NoSpaceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"{disk} is full; free space and try again") from error
        raise


class Space:
    """The database's disk, and what is held back on it. Called from any thread."""

    def __init__(self, folder: Path, reserve_bytes: int) -> None:
        """The reserve lies in `folder`, which need not exist, and holds nothing else."""
        self._folder = folder.parent
        self._reserve = Reserve(folder, reserve_bytes)
        self._gate = threading.Lock()
        self.is_full = False
        """From a write that met a full disk, until the reserve is held again."""
        self.has_lost_writes = False
        """Whether a write failed for good; a heartbeat may have been among them."""

    def open(self) -> None:
        """At the start: hold the reserve; on a full disk give some up, to start at all."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._is_short() or not self._reserve.hold():
            self._mark_full()
            self._reserve.release(PIECES // 2)

    def give_way(self, error: NoSpaceError) -> bool:
        """A write met a full disk: give some of the reserve. Whether another try may find room."""
        with self._gate:
            is_other_disk = isinstance(error.__cause__, OSError) and not self._is_short()
            if is_other_disk:  # where a model should have gone, for one
                return False
            self._mark_full()
            return self._reserve.release() or not self._is_short()

    def look(self) -> bool:
        """Now and then: hold the reserve again where there is room. Whether it just healed."""
        with self._gate:
            if not self.is_full and self._is_short():
                self._mark_full()
            if not self.is_full:
                return False
            wanted = self._reserve.size_bytes + 2 * FULL_BYTES
            room = Room.of(self._folder)
            if not room.has(wanted, 2 * PIECES) or not self._reserve.hold():
                return False
            self.is_full = False
        _log.warning("the disk has room again; new work is taken")
        return True

    def refuse(self) -> None:
        """Raises NoSpaceError where new work can't be taken now."""
        if not self.is_full and self._is_short():
            with self._gate:
                self._mark_full()
        if self.is_full:
            raise NoSpaceError(self.trouble or "the disk is full")

    @property
    def trouble(self) -> str | None:
        """What is wrong, in a sentence; None where there is room."""
        if not self.is_full:
            return None
        room = Room.of(self._folder)
        wanted = (self._reserve.size_bytes + 2 * FULL_BYTES) / 1e6
        return (
            f"the disk that holds {self._folder} is full ({_told(room)}); what runs goes on, new "
            f"work is taken again once {wanted:.0f} MB and {2 * PIECES} files' names are free"
        )

    def _mark_full(self) -> None:
        if not self.is_full:
            _log.error("the disk that holds %s is full; no new work is taken", self._folder)
        self.is_full = True

    def _is_short(self) -> bool:
        return not Room.of(self._folder).has(FULL_BYTES, FULL_NAMES)


def _told(room: Room) -> str:
    names = "" if room.names is None else f", {room.names} names"
    return f"{room.bytes / 1e6:.1f} MB{names} left"

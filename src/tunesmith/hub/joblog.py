"""The log of a job that runs on another host: stretches sent by offset, each stored once."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.spec.strict import Strict
from tunesmith.store.space import told_as_no_space
from tunesmith.work.pump import CappedLog

_NOTE = "log.json"


class _Taken(Strict):
    """How far an attempt's log was taken, and how the job's log was then."""

    offset: int = 0
    inode: int = 0
    size: int = 0
    head: int | None = None
    cut: int = 0


@dataclass(frozen=True)
class JobLog:
    path: Path
    """The job's log; other attempts' lines are in it too."""
    attempt_dir: Path
    max_bytes: int

    def take(self, offset: int, body: bytes) -> int:
        """Append what is new of a stretch that begins at `offset` of the attempt's log.

        Returns how far it was taken; behind a gap nothing is. What a crash left half-noted is cut
        off again, so that no byte is stored twice. Raises NoSpaceError.
        """
        with told_as_no_space(), self._alone():
            taken = self._read()
            fresh = body[taken.offset - offset :] if offset <= taken.offset else b""
            if not fresh:
                return taken.offset
            self._cut_off(taken)
            log = CappedLog(self.path, self.max_bytes, taken.head, taken.cut)
            try:
                log.write(fresh)
            finally:
                log.close()
            return self._note(taken.offset + len(fresh), log)

    def _cut_off(self, taken: _Taken) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat()
            if taken.offset and found.st_ino == taken.inode and found.st_size > taken.size:
                os.truncate(self.path, taken.size)

    def _note(self, offset: int, log: CappedLog) -> int:
        found = self.path.stat()
        taken = _Taken(
            offset=offset, inode=found.st_ino, size=found.st_size, head=log.head, cut=log.cut
        )
        part = self.attempt_dir / f".{_NOTE}.part"
        part.write_text(taken.model_dump_json())
        os.replace(part, self.attempt_dir / _NOTE)
        return offset

    def _read(self) -> _Taken:
        try:
            return _Taken.model_validate_json((self.attempt_dir / _NOTE).read_bytes())
        except (OSError, ValueError):
            return _Taken()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.attempt_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.attempt_dir / ".log.lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

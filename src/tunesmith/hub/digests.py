"""Digests of files, read once for as long as a file stays as it is."""

import hashlib
import threading
from pathlib import Path

from tunesmith.errors import BadRequestError
from tunesmith.store import catalog
from tunesmith.store.database import Store

_BLOCK = 1 << 20
_MAX_KNOWN = 100_000
_Stamp = tuple[int, int, int, int, int]


class Digests:
    """Remembered by path and stamp: in memory, and in the database for after a restart.

    Called on any thread; the same file is not read twice at once.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[str, _Stamp], str] = {}
        self._reading = threading.Lock()

    def of(self, path: Path) -> str:
        """SHA-256 of a file's bytes. Raises OSError, BadRequestError where it changes meanwhile."""
        mark = (str(path), _stamp(path))
        known = self._known.get(mark)
        if known is not None:
            return known
        with self._reading:
            known = self._known.get(mark) or self._kept(mark) or self._read(path, mark)
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            self._known[mark] = known
        return known

    def _kept(self, mark: tuple[str, _Stamp]) -> str | None:
        found = self._store.read(lambda tx: catalog.find_verdict(tx, _key(mark)))
        return None if found is None else str(found["sha256"])

    def _read(self, path: Path, mark: tuple[str, _Stamp]) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if _stamp(path) != mark[1]:
            raise BadRequestError(f"{path.name} was changed while it was read; try again")
        text = digest.hexdigest()
        self._store.write(
            lambda tx: catalog.keep_verdict(tx, _key(mark), {"sha256": text})
        ).result()
        return text


def _key(mark: tuple[str, _Stamp]) -> str:
    return "digest:" + hashlib.sha256(repr(mark).encode()).hexdigest()


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

"""What a host fetched, by the SHA-256 of its bytes: kept for later jobs up to a size."""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.manifest import fsync_folder

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_LOOK_SECONDS = 0.2
STALE_SECONDS = 7 * 86400.0
"""What was half-fetched and not gone on with for so long is dropped."""


@dataclass(frozen=True)
class Cache:
    folder: Path
    max_bytes: int

    def find(self, sha256: str, size: int) -> Path | None:
        """A whole file; it counts as used just now."""
        path = self.folder / sha256
        try:
            if path.stat().st_size != size:
                return None
            os.utime(path)
        except OSError:
            return None
        return path

    @contextlib.asynccontextmanager
    async def part(self, sha256: str) -> AsyncIterator[Path]:
        """Where a file is being fetched to; one fetcher a file, of all processes on this host."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{sha256}.part"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(descriptor, path):
                    break
            except OSError:
                pass
            os.close(descriptor)
            await asyncio.sleep(_LOOK_SECONDS)
        try:
            yield path
        finally:
            os.close(descriptor)

    def take(self, part: Path, sha256: str) -> Path | None:
        """Make a fetched file a whole one. None where its bytes are others, which are dropped."""
        if digest_of(part) != sha256:
            os.truncate(part, 0)
            return None
        target = self.folder / sha256
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, target)
        fsync_folder(self.folder)
        return target

    def drop(self, sha256: str) -> None:
        (self.folder / sha256).unlink(missing_ok=True)

    def adopt(self, path: Path, sha256: str) -> None:
        """Keep a file of our own too, whose digest is known: it may be asked for again."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(OSError):
            os.link(path, self.folder / sha256)

    def thin(self) -> None:
        """Let go of what was used least lately, until the rest fits. What jobs use now stays."""
        held = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                found = path.stat()
                if path.suffix == ".part" and time.time() - found.st_mtime < STALE_SECONDS:
                    continue
                held.append((found.st_mtime, found.st_size, found.st_nlink, path))
        size = sum(one[1] for one in held)
        for modified, bytes_, links, path in sorted(held):
            is_stale = path.suffix == ".part"
            if not is_stale and (size <= self.max_bytes or links > 1):
                continue
            path.unlink(missing_ok=True)
            size -= bytes_
            log.info("cache: %s was let go, last used at %.0f", path.name[:12], modified)


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def link(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the file that was locked has not been moved or removed meanwhile."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        return False

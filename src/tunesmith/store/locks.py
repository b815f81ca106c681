"""Files that a living process holds: its lock ends with it, however it ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


def try_hold(path: Path) -> int | None:
    """Lock a file, made where it is not there. Returns the descriptor that holds the lock until it
    is closed, or None where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # who had it before took the file away


def _is_still(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    return False


def hold(path: Path, patience_seconds: float) -> int:
    """As `try_hold`, but wait for it. Raises TimeoutError."""
    deadline = time.monotonic() + patience_seconds
    while (descriptor := try_hold(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process holds {path.name}")
        time.sleep(0.05)
    return descriptor


def let_go(path: Path, descriptor: int) -> None:
    """Take the file away, and with it the lock."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


@contextlib.contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Whether the file is ours inside; it is gone afterwards."""
    descriptor = try_hold(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            let_go(path, descriptor)

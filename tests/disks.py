"""Small disks of a test's own: tmpfs mounts, filled and emptied at will.

Mounting takes root (`unshare -rm pytest …` will do). Elsewhere the test is skipped, with a line
that says so; under CI, as root, it fails.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Disk:
    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all of its space but so many bytes, now; called again, what came free since."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 16, 1 << 12):
                with contextlib.suppress(OSError):
                    while self.free_bytes - size >= leave_bytes:
                        os.write(descriptor, bytes(size))
        finally:
            os.close(descriptor)

    def fill_names(self) -> None:
        """Take all of its inodes."""
        with contextlib.suppress(OSError):
            for number in range(1_000_000):
                (self.folder / f"filler-{number}").touch()

    def empty(self) -> None:
        for path in self.folder.glob("filler*"):
            path.unlink()


@contextlib.contextmanager
def a_disk(folder: Path, size: str, *options: str) -> Iterator[Disk]:
    """`folder` becomes a disk of its own, of `size` (as mount spells it)."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = ",".join([f"size={size}", "mode=0700", *options])
    command = ["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        refused = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        refused = "there is no `mount` here"
    if refused:
        told = f"no disk can be mounted for this test ({refused}); try `unshare -rm pytest`"
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(told)
        pytest.skip(told)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

"""Where the processes of one server meet: a folder named after what only they have in common."""

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from tunesmith.errors import ServerError


def meeting_place(runtime_dir: Path | None) -> Path | None:
    """By the listening socket that they inherited from their parent; None for one without.

    Under `runtime_dir` (TUNESMITH_RUNTIME_DIR) by their parent alone: for servers whose processes
    have a socket each. Raises ServerError where the folder is another user's.
    """
    parent = os.getppid()
    name = f"{parent}-{_born(parent)}"
    if runtime_dir is not None:
        return _made(runtime_dir / name)
    inherited = _bound_socket()
    if inherited is None or not Path("/proc/self/fd").is_dir():
        return None
    base = _made(Path(tempfile.gettempdir()) / f"tunesmith-{os.getuid()}")
    _sweep(base)
    return _made(base / f"{name}-{inherited}")


def _bound_socket() -> int | None:
    """The inode of a socket that was bound before this process was told to start."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            told = os.stat(int(each.name))
            if stat.S_ISSOCK(told.st_mode) and _is_bound(int(each.name)):
                found.append(told.st_ino)
        except OSError:
            continue
    return min(found, default=None)


def _is_bound(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as held:
        if held.type != socket.SOCK_STREAM:
            return False
        try:
            held.getpeername()
        except OSError:
            name = held.getsockname()
            return bool(name[1] if isinstance(name, tuple) else name)
        return False


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    told = folder.lstat()
    if not stat.S_ISDIR(told.st_mode) or told.st_uid != os.getuid():
        raise ServerError(
            f"{folder} is not this user's; TUNESMITH_RUNTIME_DIR names a folder for the processes "
            "of this server"
        )
    return folder


def _sweep(base: Path) -> None:
    """Folders of servers that are gone."""
    for folder in base.iterdir():
        parent, born, *_ = folder.name.split("-")
        if _born(int(parent)) != born:
            shutil.rmtree(folder, ignore_errors=True)


def _born(pid: int) -> str:
    """When it started, in the kernel's ticks; a process id alone comes again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"

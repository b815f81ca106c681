"""The living processes of a workspace, and what each is, read from /proc."""

import contextlib
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_MODULES = {
    "tunesmith.train.zygote": "forker",
    "tunesmith.train": "trainer",
    "tunesmith.infer.server": "engine",
    "tunesmith.work.worker": "worker",
}
_COMMANDS = {"up": "api", "api": "api", "worker": "worker"}


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    role: str
    """api, worker, forker, trainer, engine; empty for anything else."""
    workspace: Path

    def send(self, number: signal.Signals) -> bool:
        """False where it has gone."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def is_alive(self) -> bool:
        return _state(self.pid) not in ("", "Z", "X")


def living(*workspaces: Path) -> list[Process]:
    """Of these workspaces; what has ended and waits for its parent is not living."""
    wanted = {f"TUNESMITH_WORKSPACE={place}".encode(): place for place in workspaces}
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                found += _look(int(name), wanted)
    forkers = {process.pid for process in found if process.role == "forker"}
    return [
        Process(one.pid, one.parent, "trainer", one.workspace) if one.parent in forkers else one
        for one in found
    ]


def _look(pid: int, wanted: dict[bytes, Path]) -> list[Process]:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    place = next((wanted[entry] for entry in environment if entry in wanted), None)
    if place is None or _state(pid) in ("", "Z", "X"):
        return []
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    parent = int(_stat(pid)[1])
    return [Process(pid, parent, _role(words), place)]


def _role(words: list[str]) -> str:
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if module == "tunesmith.cli":
        return _COMMANDS.get(words[words.index("-m") + 2], "")
    return _MODULES.get(module, "")


def _stat(pid: int) -> list[str]:
    """State, parent, …; empty where it has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _state(pid: int) -> str:
    return next(iter(_stat(pid)), "")


def family(root: Process, everyone: Collection[Process]) -> list[Process]:
    """A process, its children, theirs."""
    found = [root]
    for member in found:
        found += [one for one in everyone if one.parent == member.pid]
    return found


def cpu_seconds(pid: int) -> float:
    """Used so far; 0 where it has gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def wait_until_gone(pids: Collection[int], seconds: float) -> set[int]:
    """Returns those that are still there when the time is over."""
    deadline = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if _state(pid) not in ("", "Z", "X")}
        time.sleep(0.01)
    return left

"""Whether the kernel killed a trainer because the memory was used up, and how much it held.

The kernel counts such kills: for the group of processes we are in, else for the host.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""What version 1 of the groups says where there is no limit is about 2 to the 63."""


@dataclass
class Watch:
    """Over one trainer: look now and then, and once it has gone."""

    proc: Path = PROC
    groups: Path = GROUPS
    resident_bytes: int = 0
    """The most that was seen."""
    _kills: int | None = field(init=False)

    def __post_init__(self) -> None:
        self._kills = self._count()

    def look(self, pid: int) -> None:
        """Note what it holds, and how many were killed so far."""
        self._kills = self._count()
        text = _read(self.proc / str(pid) / "status")
        self.resident_bytes = max(self.resident_bytes, _number(text, "VmHWM:") * 1024)

    def has_killed(self) -> bool:
        """Whether the kernel killed for memory since the last look."""
        count = self._count()
        return count is not None and self._kills is not None and count > self._kills

    def sentence(self) -> str:
        held = f"it held {_gb(self.resident_bytes)}" if self.resident_bytes else "it was just begun"
        return (
            "the kernel killed the trainer because memory was used up: "
            f"{held}, of {_gb(self.limit_bytes())} in all"
        )

    def limit_bytes(self) -> int:
        """Of our group, else of the host."""
        total = _number(_read(self.proc / "meminfo"), "MemTotal:") * 1024
        for folder, name in self._folders():
            limit = "memory.max" if name == "memory.events" else "memory.limit_in_bytes"
            text = _read(folder / limit).strip()
            if text.isdigit() and int(text) < min(_NO_LIMIT, total):
                return int(text)
        return total

    def _count(self) -> int | None:
        for folder, name in self._folders():
            text = _read(folder / name)
            if "oom_kill " in text:
                return _number(text, "oom_kill")
        text = _read(self.proc / "vmstat")
        return _number(text, "oom_kill") if "oom_kill " in text else None

    def _folders(self) -> list[tuple[Path, str]]:
        """Where our group's count may be: version 2, then 1; seen from inside a container too."""
        found = []
        for line in _read(self.proc / "self" / "cgroup").splitlines():
            kinds, _, path = line.partition(":")[2].partition(":")
            inner = path.lstrip("/")
            if not kinds:
                found += [(self.groups / inner, "memory.events"), (self.groups, "memory.events")]
            elif "memory" in kinds.split(","):
                own = self.groups / "memory"
                found += [(own / inner, "memory.oom_control"), (own, "memory.oom_control")]
        return found


def _read(place: Path) -> str:
    with contextlib.suppress(OSError):
        return place.read_text("utf-8", "surrogateescape")
    return ""


def _number(text: str, name: str) -> int:
    """Of the line that begins with this word; 0 where there is none."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

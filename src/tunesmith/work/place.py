"""Where a worker stands: whether it sees the workspace's folder, and under which path."""

import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from tunesmith.manifest import write_durably

HOUSE = "house.json"
_MAX_NOTE_BYTES = 10_000


def house_id(home: Path) -> str:
    """What the API of this workspace wrote down; empty where no API was ever here."""
    try:
        found = json.loads((home / HOUSE).read_bytes()[:_MAX_NOTE_BYTES])
        return str(found["id"])[:64]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def make_house(home: Path) -> str:
    """Give the workspace an id, once; several that try at the same time agree."""
    known = house_id(home)
    if known:
        return known
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = home / f".{HOUSE}.{uuid.uuid4().hex}"
    write_durably(own, json.dumps({"id": uuid.uuid4().hex}).encode())
    try:
        os.link(own, home / HOUSE)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(own, home / HOUSE)
    own.unlink(missing_ok=True)
    return house_id(home)


def own_mark(home: Path) -> str:
    """Tells this folder from one with the same path on a host with the same name; made once."""
    place = home / "worker.id"
    try:
        known = place.read_text("ascii").strip()
    except (OSError, ValueError):
        known = ""
    if not re.fullmatch("[0-9a-f]{8}", known):
        known = uuid.uuid4().hex[:8]
        write_durably(place, known.encode())
    return known


def network() -> str:
    """The same for all processes that reach each other by loopback: kernel and network space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


@dataclass(frozen=True)
class Mount:
    """One folder under two paths: the API's workspace, and where this host has it."""

    theirs: Path
    ours: Path

    @property
    def is_same(self) -> bool:
        return self.theirs == self.ours

    def to_ours(self, path: str) -> Path:
        """What lies outside of the workspace keeps its path."""
        return _moved(Path(path), self.theirs, self.ours)

    def to_theirs(self, path: str) -> str:
        return str(_moved(Path(path), self.ours, self.theirs))


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path

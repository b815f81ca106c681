"""The hub's cache on this machine: where a repository's files lie, and whether they are all there.

Beside a repository's snapshots lie our marks: `<commit>.partial` while a download of ours runs,
`<commit>.whole` once it is done. Other tools fill the same cache, and leave no marks.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

MAX_ID_LENGTH = 96
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"{_PART}(?:/{_PART})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 16 << 20


def is_hub_id(name: str) -> bool:
    """Whether a hub could have a repository of that name: `name`, or `org/name`."""
    is_odd = "--" in name or ".." in name or name.endswith(".git")
    return len(name) <= MAX_ID_LENGTH and not is_odd and _ID.fullmatch(name) is not None


def is_commit(text: object) -> bool:
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


@dataclass(frozen=True)
class Snapshot:
    """One commit of one repository."""

    cache: Path
    repo: str
    commit: str
    """40 hexadecimal digits."""

    @classmethod
    def at(cls, cache: Path, folder: Path) -> "Snapshot | None":
        """What a snapshot's folder in this cache is the place of; None for any other path."""
        with contextlib.suppress(ValueError):
            parts = folder.relative_to(place(cache)).parts
            if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
                repo = parts[0].removeprefix("models--").replace("--", "/")
                if is_hub_id(repo) and is_commit(parts[2]):
                    return cls(cache, repo, parts[2])
        return None

    @classmethod
    def main(cls, cache: Path, repo: str) -> "Snapshot | None":
        """The commit that the cache knows as the repository's newest."""
        if not is_hub_id(repo):
            return None
        try:
            commit = (_storage(cache, repo) / "refs" / "main").read_text("ascii").strip()
        except (OSError, ValueError):
            return None
        return cls(cache, repo, commit) if is_commit(commit) else None

    @property
    def storage(self) -> Path:
        return _storage(self.cache, self.repo)

    @property
    def folder(self) -> Path:
        return self.storage / "snapshots" / self.commit

    def is_whole(self) -> bool:
        """Whether every file of it that we read is there."""
        if not (self.folder / "config.json").is_file() or self._mark("partial").exists():
            return False
        return self._mark("whole").exists() or _has_all_weights(self.folder)

    def begin(self) -> None:
        """From here on until `finish` it counts as missing."""
        self.storage.mkdir(parents=True, exist_ok=True)
        self._mark("partial").touch()

    def finish(self) -> None:
        """All is there, and the repository's name means it, unless it means another whole one."""
        self._mark("partial").replace(self._mark("whole"))
        known = Snapshot.main(self.cache, self.repo)
        if known is None or not known.is_whole():
            refs = self.storage / "refs"
            refs.mkdir(exist_ok=True)
            new = refs / f".main.{self.commit}"
            new.write_text(self.commit, "ascii")
            new.replace(refs / "main")

    def _mark(self, kind: str) -> Path:
        return self.storage / f"{self.commit}.{kind}"


def place(cache: Path) -> Path:
    return cache.expanduser().absolute()


def _storage(cache: Path, repo: str) -> Path:
    return place(cache) / ("models--" + repo.replace("/", "--"))


def _has_all_weights(folder: Path) -> bool:
    """Its safetensors, and all that an index of them names. A dangling link is no file."""
    index = folder / _INDEX
    try:
        if not index.exists():
            return any(file.is_file() for file in folder.glob("*.safetensors"))
        if index.stat().st_size > _MAX_INDEX_BYTES:
            return False
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return bool(named) and all((folder / Path(name).name).is_file() for name in named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False

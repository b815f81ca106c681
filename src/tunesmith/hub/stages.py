"""Models of a long training as they were on the way: `step-<n>` in its result, and by name."""

import re
from pathlib import Path

from tunesmith.spec.pipe import STAGES

_NAME = re.compile(r"step-[1-9][0-9]{0,9}")
_CONFIG = "config.json"


def names_in(artifact: str | None) -> list[str]:
    """Of a result, the oldest first."""
    if artifact is None:
        return []
    found = (path.parent.name for path in Path(artifact).glob(f"step-*/{_CONFIG}"))
    return sorted(filter(_NAME.fullmatch, found), key=lambda name: int(name[5:]))


def place_of(artifact: str, name: str) -> Path | None:
    return _model(Path(artifact) / name) if _NAME.fullmatch(name) else None


def on_the_way(home: Path, job_id: str, name: str) -> Path | None:
    """Of a job that has no result yet: where its newest attempt has it, or the checkpoint that came
    from another host."""
    if not _NAME.fullmatch(name):
        return None
    attempts = (home / "jobs" / job_id / "attempts").glob("[0-9]*")
    newest = sorted(attempts, key=lambda path: int(path.name), reverse=True)
    places = (one for path in newest for one in (path / STAGES / name, _checkpoint(path, name)))
    return next(filter(None, map(_model, places)), None)


def _checkpoint(attempt: Path, name: str) -> Path:
    return attempt / "checkpoints" / name / "model"


def _model(folder: Path) -> Path | None:
    return folder if (folder / _CONFIG).is_file() else None

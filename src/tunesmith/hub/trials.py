"""Trained side by side as one job: each configuration's adapter has a name and a place."""

from functools import lru_cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import select
from sqlalchemy.engine import Connection

from tunesmith.spec.rewards import REWARD_MODEL
from tunesmith.spec.sweep import ADAPTERS, TABLE, SweepTable, TrialName
from tunesmith.store import tables

_NAME: TypeAdapter[str] = TypeAdapter(TrialName)


def table_of(artifact: str | None) -> SweepTable | None:
    """What came of each, as the artifact says; None where the job was one training."""
    if artifact is None:
        return None
    place = Path(artifact) / TABLE
    try:
        found = place.stat()
    except OSError:
        return None
    return _table(place, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=1024)
def _table(place: Path, _stamp: tuple[int, ...]) -> SweepTable | None:
    try:
        return SweepTable.model_validate_json(place.read_bytes())
    except (OSError, ValidationError):
        return None


def names_in(artifact: str | None) -> list[str]:
    """Of the configurations that left an adapter."""
    table = table_of(artifact)
    return [] if table is None else [one.name for one in table.trials if one.path is not None]


def place_of(artifact: str, name: str) -> Path | None:
    """The folder of a configuration's adapter; None where there is none of that name."""
    folder = folder_of(name)
    place = None if folder is None else Path(artifact) / folder
    return place if place is not None and place.is_dir() else None


def folder_of(name: str) -> str | None:
    """In results and in checkpoints; None for what names no configuration."""
    try:
        return f"{ADAPTERS}/{_NAME.validate_python(name)}"
    except ValidationError:
        return None


def is_made_here(tx: Connection, path: Path) -> bool:
    """Whether the folder is the output of a job of this server, or a model inside of one."""
    places = [str(path)]
    if path.parent.name == ADAPTERS:
        places.append(str(path.parent.parent))
    if path.name == REWARD_MODEL:
        places.append(str(path.parent))
    query = select(tables.jobs.c.id).where(tables.jobs.c.artifact.in_(places)).limit(1)
    return tx.scalar(query) is not None

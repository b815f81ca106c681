"""Checkpoints by name: `<tuned model>:ckpt-step-<n>`, from the moment that one is sealed.

They are served as they are: no gate has compared them with their trainer.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.engine import Connection

from tunesmith.manifest import MANIFEST
from tunesmith.store.tables import checkpoints, jobs

_NAME = re.compile(r"ckpt-step-([1-9][0-9]{0,9})")
_PARTS = ("config.json", "adapter_config.json")


def step_of(name: str) -> int | None:
    """None for what names no checkpoint."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def place_of(home: Path, job_id: str, step: int) -> Path | None:
    """The model in it, of the newest attempt that has one; rows come later than manifests do."""
    attempts = (home / "jobs" / job_id / "attempts").glob("[0-9]*")
    newest = sorted(filter(_is_number, attempts), key=lambda path: int(path.name), reverse=True)
    places = (path / "checkpoints" / f"step-{step}" for path in newest)
    return next((place / "model" for place in places if _is_servable(place)), None)


class Listed(NamedTuple):
    job_id: str
    step: int
    at: float
    path: str
    owner: str
    label: str | None
    model_path: str
    """Of what the job began with."""


def listed(tx: Connection, owner: str | None) -> Iterator[Listed]:
    """Those that were told of and are there, the newest job first."""
    told = [checkpoints.c[name] for name in ("job_id", "step", "at", "path")]
    query = (
        select(*told, jobs.c.owner, jobs.c.label, jobs.c.model["path"].as_string())
        .join(jobs, jobs.c.id == checkpoints.c.job_id)
        .order_by(jobs.c.number.desc(), checkpoints.c.step, checkpoints.c.number.desc())
    )
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    last = None
    for row in map(Listed._make, tx.execute(query)):
        if (row.job_id, row.step) != last and row.step > 0 and _is_servable(Path(row.path)):
            last = row.job_id, row.step
            yield row


def _is_servable(checkpoint: Path) -> bool:
    """Sealed, and of one training: several trainings' models lie deeper."""
    is_sealed = os.path.exists(checkpoint / MANIFEST)
    return is_sealed and any(os.path.exists(checkpoint / "model" / name) for name in _PARTS)


def _is_number(path: Path) -> bool:
    return path.name.isdecimal()

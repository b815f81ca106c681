"""Checkpoints by name: `<tuned model>:ckpt-step-<n>`, from the moment that one is sealed.

Where a job trains several configurations, `<tuned model>:<configuration>:ckpt-step-<n>` names each.
They are served as they are: no gate has compared them with their trainer.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.engine import Connection

from tunesmith.hub import trials
from tunesmith.manifest import MANIFEST
from tunesmith.spec.sweep import ADAPTERS
from tunesmith.store.tables import checkpoints, jobs

_NAME = re.compile(r"ckpt-step-([1-9][0-9]{0,9})")
_PARTS = ("config.json", "adapter_config.json")


def step_of(name: str) -> int | None:
    """None for what names no checkpoint."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def place_of(home: Path, job_id: str, step: int, trial: str = "") -> Path | None:
    """The model in it, of the newest attempt that has one; rows come later than manifests do."""
    attempts = (home / "jobs" / job_id / "attempts").glob("[0-9]*")
    newest = sorted(filter(_is_number, attempts), key=lambda path: int(path.name), reverse=True)
    places = (path / "checkpoints" / f"step-{step}" for path in newest)
    model = trials.folder_of(trial) if trial else "."
    if model is None:
        return None
    found = (place / "model" / model for place in places if _is_sealed(place))
    return next(filter(_is_model, found), None)


class Listed(NamedTuple):
    job_id: str
    step: int
    at: float
    path: str
    owner: str
    label: str | None
    model_path: str
    """Of what the job began with."""
    trial: str = ""
    """Of several configurations: which."""


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
    found: Iterable[Sequence[Any]] = tx.execute(query)
    for row in (Listed(*columns) for columns in found):
        if (row.job_id, row.step) == last or row.step < 1 or not _is_sealed(Path(row.path)):
            continue
        last, model = (row.job_id, row.step), Path(row.path) / "model"
        if _is_model(model):
            yield row
        for adapter in sorted((model / ADAPTERS).glob("*/adapter_config.json")):
            yield row._replace(trial=adapter.parent.name)


def _is_sealed(checkpoint: Path) -> bool:
    return os.path.exists(checkpoint / MANIFEST)


def _is_model(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in _PARTS)


def _is_number(path: Path) -> bool:
    return path.name.isdecimal()

"""A backup of a workspace, made while its server runs: rows, then the files that the rows name.

A file is on the disk before a row names it, so whatever the copied rows name was there. What was
taken away since is no longer named by a newer copy of the rows: then one is made, until nothing is
missing. `manifest.json` is written last; a folder without it is no backup.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.engine import Connection

from tunesmith import VERSION, manifest
from tunesmith.errors import ConflictError, ServerError
from tunesmith.settings import Settings
from tunesmith.store import dump, migrate
from tunesmith.store.space import told_as_no_space
from tunesmith.store.tables import PINNED, checkpoints, is_unfinished, jobs, uploads

KIND = "backup"
FILES = "files"
TRIES = 5
OWN = ("worker.token",)
"""Of the workspace's `.tunesmith`, beside what rows name. Not its id (`house.json`): what is
restored is another house, which must not clear away what the first has in an object store."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_TOLD = 100


@dataclass(frozen=True)
class Named:
    """What rows name in the workspace."""

    files: frozenset[Path]
    """Uploads, and data that jobs are still to be trained on."""
    models: frozenset[Path]
    checkpoints: tuple[tuple[Path, ...], ...]
    """Of each job that is not over, newest first: one of them is enough."""


@dataclass
class Made:
    """What a backup came to."""

    folder: Path
    files: int = 0
    size_bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    """What rows name and is not in it, with the reason."""


def back_up(
    settings: Settings, folder: Path, *, with_models: bool, tell: Callable[[str], None]
) -> Made:
    """Write a backup into `folder`, which must be absent or empty.

    Raises ConflictError, NotFoundError (no database), BadRequestError, NoSpaceError, ServerError.
    """
    _claim(folder)
    try:
        with told_as_no_space(f"the disk that holds {folder}"):
            return _fill(settings, folder, with_models, tell)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(settings: Settings, folder: Path, with_models: bool, tell: Callable[[str], None]) -> Made:
    made = Made(folder)
    workspace = settings.workspace.resolve()
    schema = _copy(settings, made, with_models, tell)
    for name in OWN:
        _copy_file(settings.home / name, workspace, made)
    if with_models:
        for log in sorted((workspace / "outputs" / "training_logs").glob("job_*.log")):
            _copy_file(log, workspace, made)
    tell("sealing")
    detail = {
        "version": VERSION,
        "schema": schema,
        "database": dump.kind_of(settings.url),
        "workspace": str(workspace),
        "made_at": round(time.time(), 3),
        "has_models": with_models,
        "left_out": made.left_out[:_MAX_TOLD],
    }
    manifest.seal(folder, KIND, detail)
    sealed = manifest.Manifest.model_validate_json((folder / manifest.MANIFEST).read_bytes())
    made.files, made.size_bytes = len(sealed.files), sealed.size_bytes
    made.left_out += _damaged(sealed)
    return made


def _claim(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} is not an empty folder; a backup overwrites nothing")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / FILES).mkdir(mode=0o700)


def _copy(settings: Settings, made: Made, with_models: bool, tell: Callable[[str], None]) -> str:
    """Rows, and what they name. Returns the schema's number."""
    workspace = settings.workspace.resolve()
    missing: list[Path] = []
    schema = ""
    for _ in range(TRIES):
        tell("copying the database")
        with dump.snapshot(settings.url, made.folder) as rows:
            schema = migrate.current(rows) or ""
            if schema not in migrate.known():
                raise ServerError(
                    f"the database has schema {schema}, newer than this version knows; use the "
                    "version of Tunesmith that runs here"
                )
            named = _named(rows, settings, with_models)
        tell(f"copying {len(named.files)} files and {len(named.models)} models")
        before = missing
        missing = [path for path in sorted(named.files) if not _copy_file(path, workspace, made)]
        for path in sorted(named.models):
            _copy_folder(path, workspace, made)
        for paths in named.checkpoints:  # a busy job may have thinned out all that were named
            if not any(_copy_folder(path, workspace, made) for path in paths):
                missing.append(paths[0])
        if not missing or missing == before:
            break
    made.left_out += [f"{path}: it is not there any more" for path in missing]
    return schema


def _named(rows: Connection, settings: Settings, with_models: bool) -> Named:
    workspace = settings.workspace.resolve()
    files = {settings.home / "blobs" / sha256 for sha256 in rows.scalars(select(uploads.c.sha256))}
    there = {column["name"] for column in inspect(rows).get_columns(jobs.name)}  # of its schema
    sources = select(*(one for one in PINNED if one.name in there)).where(is_unfinished())
    for source in (source for row in rows.execute(sources) for source in row):
        if source is not None:
            files.add(Path(source["path"]))
    models: set[Path] = set()
    shelves: dict[str, list[Path]] = {}
    if with_models:
        made = select(jobs.c.artifact).where(jobs.c.artifact.is_not(None))
        models |= {Path(path) for path in rows.scalars(made)}
        going = select(checkpoints.c.job_id, checkpoints.c.path).order_by(
            checkpoints.c.step.desc(), checkpoints.c.number.desc()
        )
        unfinished = select(jobs.c.id).where(is_unfinished())
        for job_id, path in rows.execute(going.where(checkpoints.c.job_id.in_(unfinished))):
            if Path(path).is_relative_to(workspace):
                shelves.setdefault(job_id, []).append(Path(path))
    return Named(
        frozenset(path for path in files if path.is_relative_to(workspace)),
        frozenset(path for path in models if path.is_relative_to(workspace)),
        tuple(map(tuple, shelves.values())),
    )


def _copy_file(path: Path, workspace: Path, made: Made) -> bool:
    """False where it is not there. What was copied before stays: content never changes here."""
    place = made.folder / FILES / path.relative_to(workspace)
    if place.exists():
        return True
    part = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(path, part)
        os.replace(part, place)
    except FileNotFoundError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _copy_folder(path: Path, workspace: Path, made: Made) -> bool:
    """A sealed folder, whole or not at all: it may be replaced or thinned out while it is read.

    False where it did not come whole.
    """
    place = made.folder / FILES / path.relative_to(workspace)
    if place.exists():
        return True
    try:
        shutil.copytree(path, place)
        manifest.verify(place)
    except (FileNotFoundError, shutil.Error, manifest.BrokenManifest) as error:
        shutil.rmtree(place, ignore_errors=True)
        if manifest.is_sealed(path):
            made.left_out.append(f"{path}: {error}")
        return False
    return True


def _damaged(sealed: manifest.Manifest) -> Iterator[str]:
    """Files that lie under their digest, and are another's."""
    for entry in sealed.files:
        stem = Path(entry.path).name.partition(".")[0]
        if _DIGEST.fullmatch(stem) and entry.sha256 != stem:
            yield f"{entry.path}: its bytes are not the ones that were uploaded"


def summary(made: Made) -> dict[str, Any]:
    return {
        "folder": str(made.folder),
        "files": made.files,
        "size_bytes": made.size_bytes,
        "left_out": made.left_out,
    }

"""From a backup to a workspace that a server can start in, maybe at another place."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from tunesmith import manifest
from tunesmith.errors import BadRequestError, ConflictError, ServerError
from tunesmith.hub.backup import FILES, KIND
from tunesmith.settings import Settings
from tunesmith.store import dump, migrate, restored
from tunesmith.store.database import Store
from tunesmith.store.space import told_as_no_space


@dataclass(frozen=True)
class Restored:
    workspace: Path
    files: int
    queued_again: list[str]
    """Jobs that a worker held when the backup was made."""


def restore(source: Path, settings: Settings, tell: Callable[[str], None]) -> Restored:
    """Verify every byte of `source`, then build the workspace, which must be absent or empty.

    Raises BadRequestError (no backup, or a broken one), ConflictError (something is there),
    ServerError (it was made by a newer version), NoSpaceError.
    """
    tell("verifying")
    sealed = _verified(source)
    _refuse_filled(settings.workspace)
    _refuse_newer(sealed.detail)
    with told_as_no_space():
        tell("copying files")
        settings.home.mkdir(mode=0o700, parents=True)
        _copy(source / FILES, settings.workspace.resolve())
        tell("restoring the database")
        queued = _restore_database(source, settings, sealed.detail)
    return Restored(settings.workspace.resolve(), len(sealed.files) - 1, queued)


def _verified(source: Path) -> manifest.Manifest:
    if not (source / manifest.MANIFEST).is_file():
        raise BadRequestError(
            f"{source} is no backup, or one that was never finished: it has no {manifest.MANIFEST}"
        )
    try:
        sealed = manifest.verify(source)
    except manifest.BrokenManifest as broken:
        raise BadRequestError(
            f"the backup is damaged, and nothing was restored: {broken}"
        ) from None
    if sealed.kind != KIND or not isinstance(sealed.detail.get("workspace"), str):
        raise BadRequestError(f"{source} holds a {sealed.kind}, not a backup")
    return sealed


def _refuse_filled(workspace: Path) -> None:
    if workspace.exists() and (not workspace.is_dir() or any(workspace.iterdir())):
        raise ConflictError(
            f"the workspace {workspace} is not an empty folder; a restore overwrites nothing: name "
            "a new one with --workspace DIR"
        )


def _refuse_newer(detail: dict[str, Any]) -> None:
    schema = detail.get("schema")
    if schema not in migrate.known():
        raise ServerError(
            f"the backup has schema {schema}, newer than this version knows "
            f"({migrate.known()[-1]}); restore it with Tunesmith {detail.get('version')} or newer"
        )


def _copy(source: Path, workspace: Path) -> None:
    for path in sorted(source.rglob("*")):
        place = workspace / path.relative_to(source)
        if path.is_dir():
            place.mkdir(mode=0o700 if ".tunesmith" in place.parts else 0o777, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())


def _restore_database(source: Path, settings: Settings, detail: dict[str, Any]) -> list[str]:
    """SQLite's gets its name last: a restore that broke off leaves no database that looks whole."""
    kind, url = str(detail.get("database")), settings.url
    final = settings.home / "db.sqlite"
    is_own_file = kind == "sqlite" and not settings.database_url
    if is_own_file:
        url = f"sqlite:///{final}.part"
    dump.load(source, kind, url)

    def work(tx: Connection) -> list[str]:
        restored.relocate(tx, detail["workspace"], str(settings.workspace.resolve()))
        return restored.stop_all(tx)

    store = Store.open(url)
    try:
        queued = store.write(work).result()
    finally:
        store.close()
    if is_own_file:
        os.replace(f"{final}.part", final)
        Path(f"{final}.part.lock").unlink(missing_ok=True)
        manifest.fsync_folder(settings.home)
    return queued

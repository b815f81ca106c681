"""What a start of the server clears away: old answers, and data that nothing needs any more.

Another server may be about to name what nothing names yet: beside others, only what is old goes.
"""

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.store import catalog, idempotency, listing

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

OLD_SECONDS = 86_400.0


def sweep(hub: "Hub") -> None:
    """Forget answers older than a day; drop bytes that no upload and no unfinished job names."""
    hub.store.write(lambda tx: idempotency.sweep(tx)).result()
    hub.store.write(catalog.take_orphans).result()
    needed = _needed(hub)
    gone = 0
    for folder in (hub.settings.home / "data", hub.settings.home / "blobs"):
        for path in _files(folder):
            if path.stem not in needed:
                gone += _remove(path, 0.0 if hub.store.is_alone else OLD_SECONDS)
    if gone:
        log.info("cleared away %d files of data that nothing needs any more", gone)


def _remove(path: Path, old_seconds: float) -> bool:
    """Whether it was old. Who is about to name it makes it young, also between look and removal."""
    aside = path.with_name(f".{path.name}.gone")
    try:
        if time.time() - path.stat().st_mtime < old_seconds:
            return False
        os.rename(path, aside)
        if time.time() - aside.stat().st_mtime < old_seconds:
            os.rename(aside, path)
            return False
    except FileNotFoundError:
        return False
    aside.unlink(missing_ok=True)
    return True


def _needed(hub: "Hub") -> set[str]:
    uploads = hub.store.read(lambda tx: catalog.list_uploads(tx))
    return {upload.sha256 for upload in uploads} | hub.store.read(listing.pinned)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []

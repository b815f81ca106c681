"""What a start of the server clears away: old answers, and data that nothing needs any more."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.spec.records import JobState
from tunesmith.store import catalog, idempotency, jobs

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)


def sweep(hub: "Hub") -> None:
    """Forget answers older than a day; drop bytes that no upload and no unfinished job names."""
    hub.store.write(lambda tx: idempotency.sweep(tx)).result()
    hub.store.write(catalog.take_orphans).result()
    needed = _needed(hub)
    gone = 0
    for folder in (hub.settings.home / "data", hub.settings.home / "blobs"):
        for path in _files(folder):
            if path.stem not in needed:
                path.unlink(missing_ok=True)
                gone += 1
    if gone:
        log.info("cleared away %d files of data that nothing needs any more", gone)


def _needed(hub: "Hub") -> set[str]:
    unfinished = [state for state in JobState if not state.is_final]
    waiting = hub.store.read(lambda tx: jobs.list_jobs(tx, states=unfinished))
    uploads = hub.store.read(lambda tx: catalog.list_uploads(tx))
    named = {upload.sha256 for upload in uploads}
    for job in waiting:
        for source in (job.dataset, job.eval_dataset):
            if source is not None and source.sha256 is not None:
                named.add(source.sha256)
    return named


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []

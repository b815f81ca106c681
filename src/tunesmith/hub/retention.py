"""What is kept of a job after its end, and for how long: a duty of one process.

At once go the folders of earlier attempts, but for the one with the newest checkpoint. After
`checkpoint_days` go the rest: checkpoints with their rows. Logs and results stay. Nothing is
touched of a job that is not over or that no row speaks of, nor what anything else names.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith import manifest
from tunesmith.errors import TuningAPIError
from tunesmith.spec.records import JobState
from tunesmith.store import events, keeping
from tunesmith.store.keeping import Ended

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

DUTY = "retention"
FIRST_SECONDS = 60.0
TURN_SECONDS = 600.0
SETTLED_SECONDS = 600.0
"""A row this old without its folder: thinned out, on a slow network's file system too."""
DAY = 86_400.0
RECEIPT = "exit.json"


@dataclass
class Swept:
    """What one turn came to."""

    folders: list[Path] = field(default_factory=list)
    """Taken away."""
    rows: int = 0
    """Of checkpoints, forgotten."""
    strangers: list[Path] = field(default_factory=list)
    """Folders of jobs that no row speaks of, as after a restore: left where they are."""


class Retention:
    """A task of the server's. `run` ends only when it is cancelled."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._jobs = hub.settings.home / "jobs"
        self._told: set[Path] = set()

    async def run(self) -> None:
        wait = FIRST_SECONDS
        while True:
            await asyncio.sleep(wait)
            wait = TURN_SECONDS
            try:
                if await self._hub.duty(DUTY):
                    self._tell(await self.turn())
            except (TuningAPIError, OSError) as error:
                log.error("old checkpoints could not be cleared away: %s", error)
            except Exception:
                log.exception("a turn of retention failed")

    async def turn(self) -> Swept:
        """Look at every job's folder once. Raises OSError, TuningAPIError."""
        return await asyncio.to_thread(self._turn)

    def _turn(self) -> Swept:
        swept = Swept()
        store = self._hub.store
        folders = {path.name: path for path in _folders(self._jobs)}
        unknown = store.read(lambda tx: keeping.unknown(tx, folders))
        swept.strangers = sorted(folders[job_id] for job_id in unknown)
        over = store.read(lambda tx: keeping.ended(tx, folders.keys() - unknown))
        going = [place for job in over for place in self._going(job)]
        if going:
            named = store.read(keeping.named_paths)
            self._let_go([place for place in going if not _is_named(place, named)], swept)
        self._forget_thinned(swept)
        return swept

    def _going(self, job: Ended) -> Iterator[Path]:
        """What of an ended job is to go."""
        attempts = sorted(_folders(self._jobs / job.id / "attempts"), key=_number)
        if self._is_expired(job):
            yield from (place for attempt in attempts for place in _rests(attempt, job.state))
            return
        newest = self._newest(job.id)
        for attempt in attempts:
            is_earlier = 0 <= _number(attempt) < job.fence
            holds_newest = newest is not None and newest.is_relative_to(attempt)
            if is_earlier and not holds_newest and not (attempt / RECEIPT).exists():
                yield attempt

    def _is_expired(self, job: Ended) -> bool:
        days = self._hub.settings.checkpoint_days
        return days > 0 and job.seconds > days * DAY

    def _newest(self, job_id: str) -> Path | None:
        """The newest accepted checkpoint that is still there."""
        rows = self._hub.store.read(lambda tx: events.checkpoints(tx, job_id))
        paths = (Path(row.path) for row in rows)
        return next((path for path in paths if path.is_dir()), None)

    def _let_go(self, places: list[Path], swept: Swept) -> None:
        """Rows first: a folder without a row is found again, a row without its folder misleads."""
        for place in places:
            job_id = place.relative_to(self._jobs).parts[0]
            rows = self._hub.store.read(partial(events.checkpoints, job_id=job_id))
            self._forget([(job_id, row.path) for row in rows if _is_in(row.path, place)], swept)
            _remove(place)
            self._remove_empty(place.parent)
            swept.folders.append(place)

    def _remove_empty(self, folder: Path) -> None:
        """What held the last of a job's attempts."""
        with contextlib.suppress(OSError):
            while folder != self._jobs:
                folder.rmdir()
                folder = folder.parent

    def _forget_thinned(self, swept: Swept) -> None:
        """Rows of checkpoints that their trainer let go of, when it had newer ones."""
        old = self._hub.store.read(lambda tx: keeping.old_checkpoints(tx, SETTLED_SECONDS))
        gone = [
            (job_id, path)
            for job_id, path in old
            if _is_in(path, self._jobs) and self._jobs.is_dir() and not Path(path).exists()
        ]
        self._forget(gone, swept)

    def _forget(self, checkpoints: list[tuple[str, str]], swept: Swept) -> None:
        if not checkpoints:
            return

        def work(tx: Connection) -> None:
            for job_id, path in checkpoints:
                events.forget_checkpoint(tx, job_id, path)

        self._hub.store.write(work).result()
        swept.rows += len(checkpoints)

    def _tell(self, swept: Swept) -> None:
        if swept.folders or swept.rows:
            log.info(
                "cleared away %d folders of ended jobs, forgot %d checkpoints",
                len(swept.folders),
                swept.rows,
            )
        for place in set(swept.strangers) - self._told:
            log.warning("no job of this database made %s; it is left as it is", place)
        self._told = set(swept.strangers)


def _rests(attempt: Path, state: str) -> Iterator[Path]:
    """Of an attempt long after its job's end. A model that found no place of its own stays."""
    keeps_model = (attempt / "artifact").exists() and state == JobState.FAILED.value
    if not keeps_model and not (attempt / RECEIPT).exists():
        yield attempt
    elif (attempt / "checkpoints").exists():
        yield attempt / "checkpoints"


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


def _number(attempt: Path) -> int:
    return int(attempt.name) if attempt.name.isdigit() else -1


def _is_in(path: str, folder: Path) -> bool:
    return Path(path).is_relative_to(folder)


def _is_named(place: Path, named: set[str]) -> bool:
    return any(_is_in(path, place) for path in named)


def _remove(place: Path) -> None:
    """Sealed folders lose their manifest first: a crash leaves none that looks whole."""
    for sealed in sorted(place.rglob(manifest.MANIFEST)):
        sealed.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)

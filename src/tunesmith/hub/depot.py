"""What workers on other hosts fetch and send: from and to this disk, or the object store."""

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.engine import Connection

from tunesmith import manifest
from tunesmith.errors import ConflictError, NotFoundError, NotReadyError
from tunesmith.hub import incoming, inputs
from tunesmith.hub.elsewhere import Elsewhere
from tunesmith.hub.incoming import INCOMING, ComingPiece, Upload
from tunesmith.hub.joblog import JobLog
from tunesmith.spec.hands import NumberedEvent, Report
from tunesmith.spec.pipe import Checkpointed, Notice
from tunesmith.spec.records import CheckpointRow, Job
from tunesmith.spec.transfer import Committed, InputListing, Offer, RemoteFolder, UploadPlan
from tunesmith.store import events, jobs, rows
from tunesmith.store.objects import Objects
from tunesmith.store.tables import jobs as job_rows
from tunesmith.store.tables import workers

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)
TIDY_SECONDS = 300.0


class Depot:
    """One a server. Methods that are no coroutines block: call them on a thread."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._jobs = hub.settings.home / "jobs"
        self._tidied = -TIDY_SECONDS

    @cached_property
    def elsewhere(self) -> Elsewhere | None:
        """The object store, where one is set. Raises BadRequestError for a wrong address."""
        url = self._hub.settings.object_store_url
        return Elsewhere(Objects.open(url), self._hub.house_id, self._jobs) if url else None

    # out

    def inputs(self, job_id: str, fence: int) -> InputListing:
        """Raises FencedError, NotFoundError, BadRequestError."""
        return inputs.listing(self._hub, self._current(job_id, fence))

    def checkpoint(self, job_id: str, fence: int, manifest_sha256: str) -> RemoteFolder:
        """An accepted checkpoint of the job. Raises NotFoundError where it was cleared away."""
        self._current(job_id, fence)
        for row in self._accepted(job_id):
            folder = Path(row.path)
            if row.manifest_sha256 != manifest_sha256:
                continue
            if incoming.digest_of(folder) == manifest_sha256:
                return self._as_remote(folder)
        raise NotFoundError("this job has no such checkpoint, or no longer")

    def file(self, job_id: str, fence: int, sha256: str) -> Path:
        """One of the files that this attempt may fetch. Raises NotFoundError."""
        job = self._current(job_id, fence)
        for row in self._accepted(job_id):
            found = incoming.file_in(Path(row.path), row.manifest_sha256, sha256)
            if found is not None:
                return found
        return inputs.find(self._hub, job, sha256)

    # in

    def offer(self, job_id: str, fence: int, offer: Offer) -> UploadPlan:
        """What is missing of a folder that a worker wants to send.

        Raises FencedError, BadRequestError, NoSpaceError, NotReadyError.
        """
        self._current(job_id, fence)
        place, limit = self._place(job_id, fence), self._hub.settings.max_artifact_bytes
        upload = incoming.begin(place, offer, limit, self.elsewhere is not None)
        if upload.is_there():
            return UploadPlan(missing=(), is_elsewhere=self.elsewhere is not None)
        if self.elsewhere is not None:
            return self.elsewhere.plan(upload)
        return UploadPlan(missing=tuple(upload.missing()))

    def receive(self, job_id: str, fence: int, sha256: str, index: int) -> ComingPiece:
        """Raises FencedError, NotFoundError, ConflictError."""
        self._current(job_id, fence)
        if self.elsewhere is not None:
            raise ConflictError("pieces go to the object store here; offer the folder again")
        return self._upload(job_id, fence, sha256).receive(index)

    def commit(self, job_id: str, fence: int, sha256: str) -> Committed:
        """Give an upload its name, once all of it is there and is what its manifest says.

        Raises FencedError, NotFoundError, ConflictError, BadRequestError, NoSpaceError.
        """
        self._current(job_id, fence)
        upload = self._upload(job_id, fence, sha256)
        if self.elsewhere is None:
            return Committed(path=str(upload.commit()))
        if not upload.is_there():
            if missing := self.elsewhere.missing(upload):
                raise ConflictError(f"{len(missing)} pieces are missing, the first is {missing[0]}")
            self.elsewhere.seal(upload)
        prefix = self.elsewhere.prefix(upload)
        return Committed(path=str(upload.commit_elsewhere(prefix)))

    def take_log(self, job_id: str, fence: int, offset: int, body: bytes) -> int:
        """How far the attempt's log is stored now. Raises FencedError, NoSpaceError."""
        self._current(job_id, fence)
        limit = self._hub.settings.max_log_bytes
        place = self._place(job_id, fence)
        return JobLog(self._hub.log_path(job_id), place, limit).take(offset, body)

    async def judged(self, job_id: str, fence: int, body: Report) -> Sequence[NumberedEvent]:
        """The report's events; a checkpoint that is not where it should be becomes a notice."""
        if not any(_is_checkpoint(one) for one in body.events):
            return body.events
        is_remote = self._is_remote(body.worker_id)

        def judged(one: NumberedEvent) -> NumberedEvent:
            fault = self._fault(job_id, fence, one.event, is_remote) if _is_checkpoint(one) else ""
            return NumberedEvent(n=one.n, event=_rejected(fault)) if fault else one

        return await asyncio.to_thread(lambda: [judged(one) for one in body.events])

    def _fault(self, job_id: str, fence: int, event: dict[str, Any], is_remote: bool) -> str:
        try:
            made = Checkpointed.model_validate(event)
        except ValidationError:
            return ""  # refused where it is stored
        folder = Path(made.path)
        if folder.parent != self._place(job_id, fence) / "checkpoints" or folder.name == "..":
            return f"step {made.step}: it is not in its attempt's folder"
        if is_remote and incoming.digest_of(folder) != made.manifest_sha256:
            return f"step {made.step}: it did not come in whole"
        return ""

    def bring_here(self, folder: Path) -> None:
        """Where a folder's bytes are in the object store: fetch them. Blocks long.

        Raises NotReadyError, NoSpaceError, BrokenManifest.
        """
        if self.elsewhere is not None:
            self.elsewhere.bring_here(folder)
        elif incoming.stored(folder) is not None:
            raise _unset()

    # keeping house

    async def thin(
        self, job_id: str, fence: int, worker_id: str, said: Sequence[NumberedEvent]
    ) -> None:
        """After a new checkpoint of a host that sends them: let go of the attempt's older ones.

        Its host thins out its own disk, not this one.
        """
        if any(_is_checkpoint(one) for one in said) and self._is_remote(worker_id):
            job = self._hub.store.read(lambda tx: jobs.get(tx, job_id))
            await asyncio.to_thread(self._thin, job, fence)

    def _thin(self, job: Job, fence: int) -> None:
        place = self._place(job.id, fence) / "checkpoints"
        own = [row.path for row in self._accepted(job.id) if Path(row.path).parent == place]
        for path in own[job.spec.run.keep_checkpoints :]:
            self._hub.store.write(
                lambda tx, path=path: events.forget_checkpoint(tx, job.id, path)  # type: ignore[misc]
            ).result()
            if self.elsewhere is not None:
                self.elsewhere.forget(Path(path))
            manifest.remove(Path(path))

    async def tidy(self) -> None:
        """Now and then, in one process: clear away what attempts left half-sent."""
        if time.monotonic() - self._tidied < TIDY_SECONDS or not await self._hub.duty("depot"):
            return
        self._tidied = time.monotonic()
        await asyncio.to_thread(self.clear)

    def clear(self) -> None:
        """Half-sent folders of attempts that are over, and objects that nothing here speaks of."""
        for place in self._jobs.glob(f"*/attempts/*/{INCOMING}"):
            job_id, fence = place.parts[-4], place.parts[-2]
            if not (fence.isdigit() and self._is_current(job_id, int(fence))):
                shutil.rmtree(place, ignore_errors=True)
        if self.elsewhere is not None and (gone := self.elsewhere.clear()):
            log.info("%d objects that nothing needs any more were cleared away", gone)

    # parts

    def _place(self, job_id: str, fence: int) -> Path:
        return self._jobs / job_id / "attempts" / str(fence)

    def _current(self, job_id: str, fence: int) -> Job:
        """Raises FencedError where the attempt does not own the job any more."""
        if not self._is_current(job_id, fence):
            raise rows.fenced(job_id, fence)
        return self._hub.store.read(lambda tx: jobs.get(tx, job_id))

    def _is_current(self, job_id: str, fence: int) -> bool:
        query = select(job_rows.c.id).where(job_rows.c.id == job_id, rows.is_current(fence))
        return self._hub.store.read(lambda tx: tx.scalar(query)) is not None

    def _accepted(self, job_id: str) -> list[CheckpointRow]:
        return self._hub.store.read(lambda tx: events.checkpoints(tx, job_id))

    def _as_remote(self, folder: Path) -> RemoteFolder:
        stored, body = incoming.stored(folder), incoming.manifest_text(folder)
        if stored is None:
            return RemoteFolder(
                name=str(folder), files=incoming.listed(incoming.parsed(body), body)
            )
        if self.elsewhere is None:
            raise _unset()
        return self.elsewhere.as_remote(folder, stored)

    def _upload(self, job_id: str, fence: int, sha256: str) -> Upload:
        found = incoming.find(self._place(job_id, fence), sha256)
        if found is None:
            raise NotFoundError("no such upload was begun, or it is over; offer it again")
        return found

    def _is_remote(self, worker_id: str) -> bool:
        """Whether that worker does not see the workspace, as was written down at its claim."""

        def look(tx: Connection) -> Any:
            return tx.scalar(select(workers.c.host).where(workers.c.id == worker_id))

        return bool((self._hub.store.read(look) or {}).get("is_remote"))


def _is_checkpoint(one: NumberedEvent) -> bool:
    return one.event.get("type") == "checkpointed"


def _rejected(fault: str) -> dict[str, Any]:
    told = Notice(level="warning", code="checkpoint_rejected", message=fault)
    return told.model_dump(mode="json")


def _unset() -> NotReadyError:
    return NotReadyError(
        "these bytes are in an object store, and TUNESMITH_OBJECT_STORE_URL is not set"
    )

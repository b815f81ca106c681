"""Downloads for jobs that wait for a model of the hub: a process each, one a repository."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from sqlalchemy.engine import Connection

from tunesmith.errors import FailureClass
from tunesmith.hub import remote
from tunesmith.hub.cache import Snapshot, place
from tunesmith.hub.order import Order, Outcome, Wanted
from tunesmith.spec.records import Job
from tunesmith.store import jobs
from tunesmith.work.fork import child_environment

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

AT_ONCE = 3
"""Repositories."""
LOOK_SECONDS = 1.0
TELL_SECONDS = 5.0
"""Between two events of a job about its download."""
MOST_TOLD = 100
"""Jobs, each time."""
STALL_SECONDS = 300.0
"""Without a new byte, before a try is given up."""
ASK_SECONDS = 30.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 2.0, 60.0
"""Between two tries: doubled each time."""
_QUIET = {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}


class Downloads:
    """Tasks of the server's loop. A job is set aside here until its model is there, or never is."""

    def __init__(self, hub: "Hub", ring: Callable[[], None]) -> None:
        """`ring` is called when jobs that were set aside can be looked at again."""
        self._hub = hub
        self._ring = ring
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._aside: dict[str, Snapshot] = {}

    @property
    def waiting(self) -> frozenset[str]:
        """The ids of the jobs that are set aside."""
        return frozenset(self._aside)

    def take(self, job: Job) -> bool:
        """Whether the job's model has to come from the hub first; then it is set aside."""
        snapshot = Snapshot.at(self._hub.settings.hub_cache, Path(job.model.path))
        if snapshot is None or snapshot.is_whole():
            return False
        self._aside[job.id] = snapshot
        if snapshot.repo not in self._tasks:
            self._tasks[snapshot.repo] = asyncio.create_task(self._run(snapshot))
        return True

    async def close(self) -> None:
        """Give up what is under way; a later start of the server begins it anew."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, snapshot: Snapshot) -> None:
        try:
            async with self._room:
                outcome = await self._fetch(snapshot)
        except Exception as error:  # a download that breaks must not stop the others
            log.exception("the download of %s broke", snapshot.repo)
            outcome = Outcome(kind="final", message=f"{type(error).__name__}: {error}"[:1000])
        try:
            if outcome.kind != "done":
                await self._fail(snapshot, outcome)
        finally:
            for job_id in [one for one, its in self._aside.items() if its.repo == snapshot.repo]:
                del self._aside[job_id]
            del self._tasks[snapshot.repo]
            self._ring()

    async def _fetch(self, snapshot: Snapshot) -> Outcome:
        """Again and again, while it may help and somebody waits."""
        wait = FIRST_WAIT_SECONDS
        for left in reversed(range(self._hub.settings.hub_download_tries)):
            outcome = await self._try(snapshot)
            if outcome.kind != "again":
                break
            log.warning("the download of %s failed: %s", snapshot.repo, outcome.message)
            if left:
                told = f"the download failed ({outcome.message}); again in {wait:.0f} seconds"
                if not await self._tell(snapshot, told, "warning"):
                    break
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        if outcome.kind == "done":
            snapshot.finish()
        return outcome

    async def _try(self, snapshot: Snapshot) -> Outcome:
        settings = self._hub.settings
        asking = remote.started(lambda: remote.ask(settings, snapshot.repo, snapshot.commit))
        try:
            model = await asyncio.wait_for(asyncio.wrap_future(asking), ASK_SECONDS)
        except remote.HubRefusal as refusal:
            return Outcome(kind="final" if refusal.is_final else "again", message=str(refusal))
        except TimeoutError:
            return Outcome(kind="again", message="the hub did not answer")
        if model.snapshot.commit != snapshot.commit:
            return Outcome(kind="final", message="the hub answered for another commit")
        snapshot.begin()
        order = Order(
            repo=snapshot.repo,
            commit=snapshot.commit,
            files=[Wanted(name=f.name, size=f.size, sha256=f.sha256) for f in model.files],
            cache=place(settings.hub_cache),
            endpoint=remote.endpoint(settings),
            token=settings.hub_token.get_secret_value(),
        )
        return await self._carry_out(order, model)

    async def _carry_out(self, order: Order, model: remote.RemoteModel) -> Outcome:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tunesmith.hub.fetch"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment() | _QUIET | {"HF_ENDPOINT": order.endpoint},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        answer = asyncio.create_task(process.stdout.read())
        try:
            process.stdin.write(order.model_dump_json().encode() + b"\n")
            if not await self._watch(answer, model):
                return Outcome(kind="again", message="no byte came for minutes, or nobody waits")
            return Outcome.model_validate_json(answer.result().splitlines()[-1])
        except (IndexError, ValidationError):
            return Outcome(kind="again", message="the process that downloads was killed")
        finally:
            answer.cancel()
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _watch(self, answer: "asyncio.Task[bytes]", model: remote.RemoteModel) -> bool:
        """Tell how far it is until it ends: True. False where it stalls or nobody waits."""
        began = time.time()
        most, grew, told = -1, time.monotonic(), float("-inf")
        while not answer.done():
            seen = await asyncio.to_thread(_bytes_here, model, began)
            now = time.monotonic()
            if seen > most or seen >= model.size_bytes:
                most, grew = max(seen, most), now
            if now - grew > STALL_SECONDS:
                return False
            if now - told > TELL_SECONDS:
                told = now
                if not await self._tell(model.snapshot, _progress(model, most), "info"):
                    return False
            await asyncio.wait({answer}, timeout=LOOK_SECONDS)
        return True

    async def _tell(self, snapshot: Snapshot, message: str, level: str) -> bool:
        """Write an event for each job that still waits. Returns whether one does."""
        data = {"level": level, "code": "download", "message": message[:4000], "detail": {}}
        ids = self._waiting_for(snapshot)[:MOST_TOLD]

        def work(tx: Connection) -> list[str]:
            return [job_id for job_id in ids if not jobs.tell_waiting(tx, job_id, data)]

        for job_id in await self._hub.write(work):
            self._aside.pop(job_id, None)
        return bool(self._waiting_for(snapshot))

    async def _fail(self, snapshot: Snapshot, outcome: Outcome) -> None:
        is_full = outcome.kind == "disk_full"
        kind = FailureClass.DISK_FULL if is_full else FailureClass.DOWNLOAD
        message = f"the model {snapshot.repo} could not be downloaded: {outcome.message}"
        ids = self._waiting_for(snapshot)
        await self._hub.write(lambda tx: _fail_all(tx, ids, kind, message))

    def _waiting_for(self, snapshot: Snapshot) -> list[str]:
        return [job_id for job_id, its in self._aside.items() if its == snapshot]


def _fail_all(tx: Connection, ids: Iterable[str], kind: FailureClass, message: str) -> None:
    for job_id in ids:
        jobs.fail_queued(tx, job_id, kind, message)


def _bytes_here(model: remote.RemoteModel, since: float) -> int:
    """Of whole files, and of those that have come in part since a time (Unix seconds)."""
    folder = model.snapshot.folder
    whole = sum(file.size for file in model.files if (folder / file.name).is_file())
    part = 0
    for path in (model.snapshot.storage / "blobs").glob("*.incomplete"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        part += found.st_size if found.st_mtime >= since else 0
    return whole + part


def _progress(model: remote.RemoteModel, seen: int) -> str:
    percent = 100 * min(seen, model.size_bytes) // max(model.size_bytes, 1)
    size = model.size_bytes / 1e6
    told = f"{size / 1000:.2f} GB" if size >= 1000 else f"{size:.1f} MB"
    return f"downloading the model {model.snapshot.repo}: {percent} % of {told}"

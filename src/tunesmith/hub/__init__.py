"""The one place where parts are chosen and joined."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import select
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.errors import NoSpaceError, NotFoundError, TuningAPIError
from tunesmith.hub import data, forecast, mlflow, names, stages, submit, trials
from tunesmith.hub.asked import Request
from tunesmith.hub.bell import Bell
from tunesmith.hub.checks import Checks
from tunesmith.hub.depot import Depot
from tunesmith.hub.digests import Digests
from tunesmith.hub.duties import Duties
from tunesmith.hub.engines import Engines
from tunesmith.hub.folder import ModelFolder, read, stamp_of
from tunesmith.hub.hands import Hands
from tunesmith.hub.history import History
from tunesmith.hub.intake import Intake
from tunesmith.hub.keys import Keys, worker_token
from tunesmith.hub.known import Known
from tunesmith.hub.landing import Landing
from tunesmith.hub.leases import Leases
from tunesmith.hub.loaded import Loaded
from tunesmith.hub.logs import Logs
from tunesmith.hub.mirror import MlflowMirror
from tunesmith.hub.outbox import Outbox
from tunesmith.hub.preview import Previews
from tunesmith.hub.principal import Principal
from tunesmith.hub.remote_data import RemoteData
from tunesmith.hub.retention import Retention
from tunesmith.hub.webhooks import Webhooks
from tunesmith.rates import Rates
from tunesmith.settings import Settings
from tunesmith.spec.estimate import Estimate, Forecast
from tunesmith.spec.records import Job, JobEvent, JobState, StopMode
from tunesmith.spec.scopes import SCOPES, Scope
from tunesmith.store import catalog, events, jobs, listing, mirrors, tables
from tunesmith.store import keys as key_rows
from tunesmith.store.database import Store
from tunesmith.store.files import Blobs, Incoming
from tunesmith.store.listing import Line
from tunesmith.store.promotion import redo
from tunesmith.store.space import Space
from tunesmith.work.place import make_house

T = TypeVar("T")


class Watch(Protocol):
    """Wakes whoever waits in the server's loop when a commit touched a topic."""

    def watch(self, *topics: str) -> contextlib.AbstractContextManager[asyncio.Event]: ...


class Hub:
    """The house, open: what every door (HTTP, command line) calls."""

    def __init__(self, settings: Settings, store: Store, space: Space | None = None) -> None:
        self.settings = settings
        self.store = store
        self.workspace = settings.workspace.resolve()
        self.blobs = Blobs(settings.home / "blobs")
        self.keys = Keys(store, settings)
        self.logs = Logs()
        self.space = space or _space(settings)
        self.pinned: dict[tuple[str, data.Stamp, Reading], data.Pinned] = {}
        self.known = Known(self)
        self.history = History(store)
        self.intake = Intake(self)
        self._landing: Landing | None = None
        self.duties = Duties(self)
        self.leases = Leases(self)
        self.bell = Bell.of(settings)
        self.hands = Hands(self)
        self.engines = Engines(self)
        self.loaded = Loaded(self)
        self.rates = Rates(settings.rate_limit, settings.rate_limit_storage)
        self.house_id = make_house(settings.home)
        self.digests = Digests(store)
        self.depot = Depot(self)
        self.webhooks = Webhooks(self)
        self.previews = Previews(self)
        self.remote_data = RemoteData(self)
        self.checks: Checks
        self.watcher: Watch

    @classmethod
    def open(cls, settings: Settings) -> "Hub":
        """Open the workspace. Raises StoreLocked where another server has it."""
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.home.chmod(0o700)
        space = _space(settings)
        space.open()  # first: a start wants room too
        worker_token(settings.home)
        store = Store.open(settings.url)
        redo(settings.home / "promotions")
        return cls(settings, store, space)

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    @contextlib.asynccontextmanager
    async def running(self, watcher: Watch) -> AsyncIterator[None]:
        """While the server serves: its checks run."""
        self.watcher = watcher
        self.checks = Checks(self)
        checking = asyncio.create_task(self.checks.run())
        telling = [asyncio.create_task(Outbox(self, self.webhooks.sender).run())]
        telling.append(asyncio.create_task(Retention(self).run()))
        if self.settings.mlflow_url:
            mirror = MlflowMirror(self, mlflow.Tracking(self.settings.mlflow_url))
            telling.append(asyncio.create_task(mirror.run()))
        self.store.on_commit(self.bell.hear)
        self.bell.start()
        try:
            yield
        finally:
            self.bell.close()
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)
            await _end(telling)
            await self.webhooks.sender.close()
            await self.engines.close()
            await self.duties.release()

    async def write(self, work: Callable[[Connection], T], is_new: bool = False) -> T:
        """Run a piece of work in the writer's next commit, and wait until it is on the disk.

        On a full disk it may use the reserve, unless it `is_new` work. Raises NoSpaceError.
        """
        try:
            return await self._landed(self.store.write(work))
        except NoSpaceError as error:
            if not self.space.give_way(error) or is_new:
                self.space.has_lost_writes = True
                raise
        try:
            return await self._landed(self.store.write(work))
        except NoSpaceError:
            self.space.has_lost_writes = True
            raise

    def _landed(self, future: "Future[T]") -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()
        if self._landing is None or self._landing.loop is not loop:
            self._landing = Landing(loop)
        return self._landing.awaitable(future)

    async def look_at_disk(self) -> None:
        """A turn of keeping house. Raises NoSpaceError while leases can't be extended: then they
        must not be judged either."""
        await asyncio.to_thread(self.space.look)
        if self.space.has_lost_writes:
            await self.leases.grant()
            self.space.has_lost_writes = False

    async def duty(self, name: str) -> bool:
        """Whether this process does for all what `name` stands for. Ask before each turn."""
        return await self.duties.has(name)

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)

    # jobs

    async def submit(self, asked: Request, who: Principal) -> Job:
        return await submit.submit(self, asked, who)

    def job(self, spelled: str, who: Principal) -> Job:
        """By any contract's spelling of its id. Raises NotFoundError."""
        job_id = spelled.removeprefix("ftjob-").removeprefix("job-")
        return self.store.read(lambda tx: jobs.get(tx, job_id, who.scope))

    def lines(
        self,
        who: Principal,
        wanted: listing.Wanted | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[Line]:
        """Of each job what a list shows, newest first."""
        return self.store.read(
            lambda tx: listing.lines(tx, owner=who.scope, wanted=wanted, limit=limit, offset=offset)
        )

    async def estimate(self, asked: Request, who: Principal) -> Estimate:
        """What the job would take; nothing is submitted. Raises as `submit` does."""
        return await submit.estimate(self, asked, who)

    def estimate_of(self, job: Job) -> Forecast | None:
        """What was told beforehand, and what has happened so far."""
        return forecast.of(self.store, job)

    def trouble(self) -> str | None:
        """Why new work can't be taken now; None where it can."""
        try:
            self.store.read(lambda tx: tx.scalar(select(1)))
        except (TuningAPIError, SQLAlchemyError) as error:
            return f"the database can't be read: {error}"
        return self.space.trouble

    def job_counts(self) -> tuple[int, int]:
        """Unfinished jobs that a worker holds, and all jobs."""
        found = self.store.read(jobs.count_by_state)
        active = (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
        return sum(found[state] for state in active), sum(found.values())

    def jobs_by_state(self) -> dict[str, int]:
        return {state.value: count for state, count in self.store.read(jobs.count_by_state).items()}

    async def stop(self, spelled: str, mode: StopMode, who: Principal) -> Job:
        """Raises NotFoundError, ConflictError (it has ended)."""
        job_id = self.job(spelled, who).id

        def work(tx: Connection) -> Job:
            job = jobs.request_stop(tx, job_id, mode, self.settings.grace_seconds, who.scope)
            if job.worker_id is not None:
                tables.touch(tx, f"worker:{job.worker_id}")
            return job

        return await self.write(work)

    def mlflow_link(self, job: Job) -> str | None:
        """The page of the job's run, once MLflow has one."""
        if not self.settings.mlflow_url:
            return None
        found = self.store.read(lambda tx: mirrors.run_of(tx, job.id))
        return None if found is None else mlflow.run_page(self.settings.mlflow_url, *found)

    def events_after(self, job_id: str, seq: int) -> list[JobEvent]:
        return self.store.read(lambda tx: events.after(tx, job_id, seq))

    def log_path(self, job_id: str) -> Path:
        return self.workspace / self.log_name(job_id)

    def log_name(self, job_id: str) -> str:
        """From the workspace."""
        return f"outputs/training_logs/job_{job_id}.log"

    def log_tail(self, job: Job, lines: int) -> tuple[list[str], int]:
        try:
            return self.logs.tail(self.log_path(job.id), lines)
        except FileNotFoundError:
            return [self._waits_for(job)], 1

    def relative(self, path: str | Path) -> str:
        """As requests name it: from the workspace, where it lies in there."""
        text, root = str(path), str(self.workspace)
        return "." if text == root else text.removeprefix(root.rstrip("/") + "/")

    def tuned_name(self, line: Line) -> str | None:
        return names.tuned_name(line)

    def _waits_for(self, job: Job) -> str:
        if job.state is not JobState.QUEUED:
            return f"no log yet: the job is {job.state}"
        if job.id in self.checks.downloads.waiting:
            return "no log yet: the model is being downloaded from the hub"
        if not job.is_validated:
            return "no log yet: the data is being checked"
        if not self.hands.living_workers():
            return "no log yet: waiting for a worker to come"
        place = self.store.read(lambda tx: jobs.queue_place(tx, job.id))
        return f"no log yet: waiting for room, number {place} in the queue"

    # models and data

    def find_data(self, name: str, who: Principal, field: str) -> names.FoundData:
        """As `names.find_data`, and what the hub has. May take seconds."""
        try:
            return names.find_data(self.store, self.settings, name, who, field)
        except NotFoundError:
            found = self.remote_data.find(name, field)
            if found is None:
                raise
            return found

    def find_model(self, name: str, who: Principal, field: str = "model") -> names.FoundModel:
        return names.find_model(self.store, self.settings, name, who, field)

    def served_names(self, who: Principal) -> list[tuple[str, float, str]]:
        """Name, when made, owner: bases, then tuned models and checkpoints, newest first."""
        registered = self.store.read(lambda tx: catalog.list_names(tx, "model"))
        found = [(row.name, row.created_at, "tunesmith") for row in registered]
        found += names.folders(self.settings, {row.name for row in registered})
        for line in self.lines(who, listing.Wanted([JobState.SUCCEEDED])):
            name = names.tuned_name(line)
            if name is not None:
                is_staged = line.method == "pretrain"
                parts = stages.names_in if is_staged else trials.names_in
                inner = [f"{name}:{one}" for one in parts(line.artifact)]
                found += [(one, line.finished_at or 0.0, line.owner) for one in (name, *inner)]
        found += names.checkpoint_names(self.store, who)
        return found + [(name, 0.0, "external") for name in self.engines.foreign.names]

    def renderer(self, folder: ModelFolder, format: str) -> Renderer:
        """The model's own renderer, or with a template of ours where it has none."""
        place = folder.tokenizer_place
        return _renderer(place, stamp_of(place)).with_fallback(format)

    def keep_upload(
        self, filename: str, incoming: Incoming, who: Principal, reading: Reading = Reading()
    ) -> data.Upload:
        return data.keep_upload(self, filename, incoming, who, reading)

    # the operator's

    def place_of(self, name: str) -> Path:
        """The folder of a model, an adapter's where it is one. Raises NotFoundError."""
        return self.find_model(name, Principal.local()).folder.path.resolve()

    def register_model(self, name: str, path: str) -> dict[str, Any]:
        """Paths of the operator may lie anywhere. Raises BadRequestError where it is no model."""
        place = Path(path).expanduser().resolve()
        read(place, "path")
        return self._register("model", name, place)

    def register_data(self, name: str, path: str) -> dict[str, Any]:
        place = Path(path).expanduser().resolve()
        if not place.is_file():
            raise NotFoundError(f"path: no file at {path!r}", param="path")
        return self._register("dataset", name, place)

    def names(self, kind: str) -> list[dict[str, Any]]:
        rows = self.store.read(lambda tx: catalog.list_names(tx, _kind(kind)))
        return [{"name": row.name, "path": row.path} for row in rows]

    def forget(self, kind: str, name: str) -> None:
        self.store.write(lambda tx: catalog.remove(tx, _kind(kind), name)).result()

    def make_key(
        self,
        owner: str,
        label: str = "",
        is_worker: bool = False,
        scopes: Sequence[Scope] | None = None,
    ) -> dict[str, Any]:
        """The key itself is in the answer, and nowhere else."""
        work = partial(key_rows.make, owner=owner, name=label, is_worker=is_worker, scopes=scopes)
        row, text = self.store.write(work).result()
        self.keys.forget()
        found = {"id": row.id, "key": text, "owner": row.owner, "label": row.name}
        return found | {"is_worker": True} if is_worker else found

    def list_keys(self) -> list[dict[str, Any]]:
        return [
            {
                "id": row.id,
                "owner": row.owner,
                "label": row.name,
                "hint": row.hint,
                "created_at": row.created_at,
                "is_revoked": row.revoked_at is not None,
                "is_worker": row.is_worker,
                "scopes": list(row.scopes or SCOPES),
            }
            for row in self.store.read(key_rows.list_keys)
        ]

    def revoke_key(self, key_id: str) -> None:
        self.store.write(lambda tx: key_rows.revoke(tx, key_id)).result()
        self.keys.forget()

    def _register(self, kind: catalog.Kind, name: str, place: Path) -> dict[str, Any]:
        self.store.write(
            lambda tx: catalog.register(tx, kind, name, str(place), "operator", should_replace=True)
        ).result()
        return {"name": name, "path": str(place)}


def _space(settings: Settings) -> Space:
    """Its reserve lies beside the database, where that is a file."""
    url = make_url(settings.url)
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    folder = f"{url.database}.reserve" if is_file else settings.home / "reserve"
    return Space(Path(folder).absolute(), settings.reserve_bytes)


async def _end(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _kind(word: str) -> catalog.Kind:
    return "model" if word == "models" else "dataset"


_renderers = threading.Lock()


def _renderer(place: Path, stamp: tuple[object, ...]) -> Renderer:
    with _renderers:
        return _load_renderer(place, stamp)


@lru_cache(maxsize=32)
def _load_renderer(place: Path, _stamp: tuple[object, ...]) -> Renderer:
    return Renderer.load(place)

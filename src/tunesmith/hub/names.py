"""From a name in a request to a folder or a file: tuned models, paths, registered names."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tunesmith.errors import BadRequestError, NotFoundError
from tunesmith.hub import checkpoints, remote, stages, trials
from tunesmith.hub.cache import Snapshot
from tunesmith.hub.folder import ModelFolder, read
from tunesmith.hub.principal import Principal
from tunesmith.settings import Settings
from tunesmith.spec.records import Job, JobState
from tunesmith.store import catalog, jobs
from tunesmith.store.database import Store
from tunesmith.store.files import confine
from tunesmith.store.listing import Line

MAX_GENERATIONS = 16
MAX_LISTED = 1000
DATA_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class FoundModel:
    name: str
    """As it was asked for."""
    folder: ModelFolder
    owner: str = "tunesmith"
    is_here: bool = True
    """False: the folder is one that a download from the hub will make."""

    @property
    def adapter_key(self) -> str:
        """The adapter's name inside an engine: its place and age, so a new one is another."""
        stamp = (self.folder.path / "adapter_config.json").stat().st_mtime_ns
        mark = hashlib.sha256(f"{self.folder.path}:{stamp}".encode()).hexdigest()[:12]
        return f"adapter-{mark}"


@dataclass(frozen=True)
class FoundData:
    name: str
    path: Path
    """A file: of the workspace, or a blob."""
    suffix: str
    sha256: str | None = None
    """Where it is known already: an upload, content-addressed."""


def find_model(
    store: Store, settings: Settings, name: str, who: Principal, field: str = "model"
) -> FoundModel:
    """Raises NotFoundError (nothing has that name), BadRequestError (leaves the workspace)."""
    if name.startswith("ft:"):
        return _tuned(store, settings, name, who, field)
    path = confine(name, settings.workspace, settings.allowed_roots, field)
    if path.is_dir():
        found = read(path, field)
        _refuse_foreign(store, settings, found, field)
        return FoundModel(name, found)
    registered = store.read(lambda tx: catalog.find(tx, "model", name))
    if registered is not None:
        return FoundModel(name, read(Path(registered.path), field))
    cached = Snapshot.main(settings.hub_cache, name)
    if cached is not None and cached.is_whole():
        return FoundModel(name, read(cached.folder, field))
    raise NotFoundError(
        f"{field}: no model {name!r}: not a folder in the workspace, not a registered name "
        "(tunesmith models add NAME PATH), not in the local hub cache",
        param=field,
    )


def find_base(
    store: Store, settings: Settings, name: str, who: Principal, field: str = "model"
) -> FoundModel:
    """A model to train on: as `find_model`, and what the hub has. Raises NoSpaceError as well."""
    try:
        return find_model(store, settings, name, who, field)
    except NotFoundError:
        folder = remote.find(settings, name, field)
        if folder is None:
            raise
        return FoundModel(name, folder, is_here=False)


def find_data(
    store: Store, settings: Settings, name: str, who: Principal, field: str = "dataset"
) -> FoundData:
    """Raises NotFoundError, BadRequestError as `find_model`."""
    candidates = [name] + [f"datasets/{name}{suffix}" for suffix in ("", *DATA_SUFFIXES)]
    for candidate in candidates:
        path = confine(candidate, settings.workspace, settings.allowed_roots, field)
        if path.exists() and not path.is_dir():
            return FoundData(name, path, path.suffix)
    upload = store.read(lambda tx: catalog.find_upload(tx, name, who.scope))
    if upload is not None:
        blob = settings.home / "blobs" / upload.sha256
        return FoundData(name, blob, Path(upload.name).suffix, upload.sha256)
    registered = store.read(lambda tx: catalog.find(tx, "dataset", name))
    if registered is not None and Path(registered.path).is_file():
        path = Path(registered.path).resolve()
        return FoundData(name, path, path.suffix)
    raise NotFoundError(
        f"{field}: no data set {name!r}: not a file in the workspace, not an upload "
        "(POST /upload/dataset), not a registered name (tunesmith data add NAME PATH)",
        param=field,
    )


def tuned_name(line: Line) -> str | None:
    """`ft:<last part of the root base>:<org>:<suffix>:<job id>`, once there is a model.

    Of a job of several configurations it is the best one's; `:<configuration>` after it names each,
    as `:step-<n>` names a stage of a pretraining, before its end too.
    """
    if line.state != JobState.SUCCEEDED or line.artifact is None:
        return None
    return _spelled(line.model_path, line.label, line.id)


def _spelled(model_path: str, label: str | None, job_id: str) -> str:
    return f"ft:{_root_name(Path(model_path))}:local:{label or ''}:{job_id}"


def checkpoint_names(store: Store, who: Principal) -> list[tuple[str, float, str]]:
    """Name, when made, owner of each that is there; `find_model` knows one before this does."""
    found = store.read(lambda tx: list(checkpoints.listed(tx, who.scope)))
    return [(_checkpoint_name(one), one.at, one.owner) for one in found]


def _checkpoint_name(one: checkpoints.Listed) -> str:
    tuned = _spelled(one.model_path, one.label, one.job_id)
    return ":".join(filter(None, (tuned, one.trial, f"ckpt-step-{one.step}")))


def folders(settings: Settings, taken: set[str]) -> list[tuple[str, float, str]]:
    """The same of the bases in the workspace's `models`, but for those whose names are `taken`."""
    places = sorted((settings.workspace / "models").glob("*/config.json"))[:MAX_LISTED]
    named = [(f"models/{place.parent.name}", place) for place in places]
    return [
        (name, place.stat().st_mtime, "tunesmith") for name, place in named if name not in taken
    ]


def _root_name(path: Path) -> str:
    """The last part of the name of the model that all tuning began with."""
    for _ in range(MAX_GENERATIONS):
        before = _tuned_from(path)
        if before is None:
            break
        path = before
    if path.parent.name == "snapshots":  # of the hub's cache: the folder's name is a commit
        return path.parents[1].name.rpartition("--")[2] or "model"
    return path.name or "model"


def _tuned_from(path: Path) -> Path | None:
    """The model that a job of ours tuned to make this one, as its record says."""
    record = path / "training.json"
    try:
        found = record.stat()
    except OSError:
        return None
    return _base_of(record, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=1024)
def _base_of(record: Path, _stamp: tuple[int, ...]) -> Path | None:
    try:
        body = json.loads(record.read_bytes())
        if body["spec"].get("from_scratch"):
            return None
        return Path(str(body["base_model"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tuned(store: Store, settings: Settings, name: str, who: Principal, field: str) -> FoundModel:
    whole, _, last = name.rpartition(":")
    job, place = _job(store, last, who), None
    if job is not None and job.artifact is not None:
        place = Path(job.artifact)
    elif job := _job(store, whole.rpartition(":")[2], who):
        place = _part(settings, job, last)
    elif step := checkpoints.step_of(last):
        begun, _, trial = whole.rpartition(":")
        job = _job(store, begun.rpartition(":")[2], who)
        if job is not None:
            place = checkpoints.place_of(settings.home, job.id, step, trial)
    if job is None or place is None:
        raise NotFoundError(
            f"{field}: no tuned model {name!r}; GET /v1/models lists them", param=field
        )
    return FoundModel(name, read(place, field), job.owner)


def _part(settings: Settings, job: Job, name: str) -> Path | None:
    """What a job made beside its model: a configuration's adapter, a stage on the way, or a
    checkpoint."""
    step = checkpoints.step_of(name)
    if step is not None:
        return checkpoints.place_of(settings.home, job.id, step)
    if job.artifact is None:
        return stages.on_the_way(settings.home, job.id, name)
    return trials.place_of(job.artifact, name) or stages.place_of(job.artifact, name)


def _job(store: Store, job_id: str, who: Principal) -> Job | None:
    try:
        return store.read(lambda tx: jobs.get(tx, job_id, who.scope))
    except NotFoundError:
        return None


def _refuse_foreign(store: Store, settings: Settings, found: ModelFolder, field: str) -> None:
    """A folder of the workspace may point out of it only where we wrote it, or to what the
    operator gave a name."""
    roots = [settings.workspace, *settings.allowed_roots, settings.hub_cache]
    real_roots = [root.resolve() for root in roots]
    foreign = [file for file in found.files if not _lies_in(file, real_roots)]
    if not foreign or store.read(lambda tx: trials.is_made_here(tx, found.path)):
        return
    if found.base != found.path and all(file.is_relative_to(found.base) for file in foreign):
        known = store.read(lambda tx: catalog.list_names(tx, "model"))
        if found.base.resolve() in {Path(row.path) for row in known}:
            return
    raise BadRequestError(
        f"{field}: {found.path.name} leads to files out of the workspace; copy them into it, or "
        "register the model they belong to (tunesmith models add NAME PATH)",
        param=field,
    )


def _lies_in(file: Path, roots: list[Path]) -> bool:
    real = file.resolve()
    return any(real.is_relative_to(root) for root in roots)

"""An attempt's files on its own host: what goes in, and where what comes out goes."""

import asyncio
import contextlib
import json
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import FencedError, TuningAPIError
from tunesmith.manifest import BrokenManifest, verify
from tunesmith.spec.hands import Assignment
from tunesmith.spec.pipe import KNOWN, Inputs, Notice
from tunesmith.spec.records import CheckpointRow
from tunesmith.spec.transfer import InputListing, RemoteFile, RemoteFolder, RemoteModel
from tunesmith.work.cache import Cache, link
from tunesmith.work.fetch import Fetcher, as_failure
from tunesmith.work.place import Mount, house_id
from tunesmith.work.receipt import NAME as RECEIPT
from tunesmith.work.wire import Wire

log = logging.getLogger(__name__)

AWAY = "stored.json"
"""In a checkpoint's folder where its bytes are in an object store."""
KEPT_SECONDS = 7 * 86400.0
"""What a fenced attempt left, on a host of its own."""
LISTING_SECONDS = 600.0
"""The API reads every byte of a model, the first time."""
_ADAPTER = "adapter_config.json"
Say = Callable[[Notice], None]
Pick = Callable[[InputListing], RemoteModel]
"""One of a listing's models."""
T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """This worker's folders."""

    home: Path
    """`.tunesmith` of its own."""
    cache: Cache

    @property
    def workspace(self) -> Path:
        return self.home.parent

    def tidy(self) -> None:
        """At the start: what was fetched and is over the limit, and fenced attempts' old files."""
        self.cache.thin()
        if house_id(self.home):
            return  # the API's own folders
        for place in self.home.glob("jobs/*/attempts/*"):
            is_waiting = (place / RECEIPT).exists()
            if not is_waiting and time.time() - place.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(place, ignore_errors=True)


@dataclass
class Staging:
    """Of one attempt. `site` None: the API's own folders, as they are."""

    job: Assignment
    wire: Wire
    site: Site | None = None

    def __post_init__(self) -> None:
        theirs = Path(self.job.workspace or "/")
        self.mount = Mount(theirs, self.site.workspace if self.site else theirs)
        self._route = f"/attempts/{self.job.job_id}/{self.job.fence}"
        self._listing: InputListing | None = None

    @property
    def is_remote(self) -> bool:
        return self.job.is_remote

    @property
    def attempt_dir(self) -> Path:
        """Where the trainer writes."""
        if self.is_remote:
            assert self.site is not None
            jobs = self.site.home / "jobs"
            return jobs / self.job.job_id / "attempts" / str(self.job.fence)
        return self.mount.to_ours(self.job.attempt_dir)

    @property
    def log_path(self) -> Path:
        return self.mount.to_ours(self.job.log_path)

    def to_theirs(self, path: str) -> str:
        """As the API names what the trainer wrote."""
        if not self.is_remote:
            return self.mount.to_theirs(path)
        return str(Path(self.job.attempt_dir) / Path(path).relative_to(self.attempt_dir))

    def note_known(self, accepted: Sequence[dict[str, Any]]) -> None:
        """Have the trainer keep the newest checkpoint that the API knows of, if it is here."""
        made = [event["path"] for event in accepted if event["type"] == "checkpointed"]
        if not made or self.is_remote:
            return
        place = self.attempt_dir / KNOWN
        with contextlib.suppress(OSError):  # a full disk: then it lets go of the older ones
            place.with_suffix(".part").write_text(Path(made[-1]).name, "ascii")
            place.with_suffix(".part").replace(place)

    def clear(self) -> None:
        """Of a host of its own: the API has what was made."""
        shutil.rmtree(self.attempt_dir, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: another attempt's
            for folder in (self.attempt_dir.parent, self.attempt_dir.parents[1]):
                folder.rmdir()

    async def inputs(self) -> Inputs:
        """What the trainer is told; what is not to be seen here is fetched first.

        Raises JobFailure, FencedError, OSError.
        """
        asked = self.job.inputs
        model, named = await self._model(asked.model, _tuned, "model", "base")
        rewarding: dict[str, str] = {}
        for number, (name, path) in enumerate(asked.reward_models.items()):
            mark = f"reward-{number}"
            found, more = await self._model(path, _rewarding(name), mark, f"{mark}-base")
            rewarding[name], named = str(found), named | more
        evaluation, tokenizer = asked.eval_dataset, asked.tokenizer
        return Inputs(
            model=str(model),
            dataset=str(await self._data(asked.dataset, "dataset")),
            eval_dataset=str(await self._data(evaluation, "eval_dataset")) if evaluation else None,
            reward_models=rewarding,
            networks=asked.networks,
            tokenizer=str(await self._data(tokenizer, "tokenizer")) if tokenizer else None,
            named=named,
        )

    async def newest_checkpoint(self, say: Say) -> str | None:
        """The newest accepted checkpoint whose every byte is as its manifest says."""
        for row in self.job.checkpoints:
            try:
                folder = await self._checkpoint(row)
            except BrokenManifest as error:
                say(
                    Notice(
                        level="warning",
                        code="checkpoint_rejected",
                        message=f"step {row.step}: {error}"[:4000],
                        detail={"step": row.step, "fence": row.fence},
                    )
                )
                continue
            if folder is not None:
                return str(folder)
        if self.job.checkpoints:
            say(_starts_anew(self.job))
        return await self._asked_for()

    async def _checkpoint(self, row: CheckpointRow) -> Path | None:
        """None where it was cleared away. Raises BrokenManifest."""
        path = self.mount.to_ours(row.path)
        if not self.is_remote and not (path / AWAY).exists():
            if not path.exists():
                return None
            await asyncio.to_thread(verify, path, row.manifest_sha256)
            return path
        listing = await self._remote_checkpoint(row)
        if listing is None:
            return None
        folder = await self._laid_out(listing, f"checkpoint-{row.manifest_sha256[:12]}")
        try:
            await asyncio.to_thread(verify, folder, row.manifest_sha256)
        except BrokenManifest:
            self._drop(listing)
            raise
        return folder

    async def _remote_checkpoint(self, row: CheckpointRow) -> RemoteFolder | None:
        path = f"{self._route}/checkpoints/{row.manifest_sha256}"
        try:
            return await self.wire.insist(path, None, RemoteFolder, self.job.token)
        except FencedError:
            raise
        except TuningAPIError as error:
            if error.status_code == 404:
                return None
            raise as_failure(
                error, lambda said: f"the checkpoint of step {row.step}: {said}"
            ) from None

    async def _asked_for(self) -> str | None:
        """A checkpoint that the user named."""
        if self.job.resume_from is None:
            return None
        path = self.mount.to_ours(self.job.resume_from)
        if self.site is None or (not self.is_remote and path.exists()):
            return str(path)
        listing = (await self._listed()).resume_from
        return None if listing is None else str(await self._laid_out(listing, "resume"))

    async def _model(
        self, asked: str, pick: Pick, place: str, base_place: str
    ) -> tuple[Path, dict[str, str]]:
        """A model's folder here, and what results call it."""
        path = self.mount.to_ours(asked)
        if self.site is None or (not self.is_remote and _is_usable(path, self.mount.is_same)):
            return path, {} if self.mount.is_same else {str(path): asked}
        listing = pick(await self._listed())
        model = await self._laid_out(listing.model, place)
        named = {str(model): listing.model.name}
        if listing.base is not None:
            base = await self._laid_out(listing.base, base_place)
            named[str(base)] = listing.base.name
            _stand_on(model / _ADAPTER, base)
        return model, named

    async def _data(self, asked: str, which: str) -> Path:
        path = self.mount.to_ours(asked)
        if self.site is None or (not self.is_remote and path.is_file()):
            return path
        wanted: RemoteFile | None = getattr(await self._listed(), which)
        assert wanted is not None
        cached = await self._fetch(lambda fetcher: fetcher.file(wanted))
        target = self._place(which) / wanted.name
        await asyncio.to_thread(link, cached, target)
        return target

    async def _listed(self) -> InputListing:
        if self._listing is None:
            try:
                path = f"{self._route}/inputs"
                self._listing = await self.wire.insist(
                    path, None, InputListing, self.job.token, LISTING_SECONDS
                )
            except FencedError:
                raise
            except TuningAPIError as error:
                raise as_failure(error, lambda said: f"the job's inputs: {said}") from None
        return self._listing

    async def _laid_out(self, listing: RemoteFolder, name: str) -> Path:
        """The folder as its user expects it, of names that point into the cache."""
        found = await self._fetch(lambda fetcher: fetcher.folder(listing))
        target = self._place(name)
        shutil.rmtree(target, ignore_errors=True)
        for inner, path in found.items():
            await asyncio.to_thread(link, path, target / inner)
        return target

    async def _fetch(self, once: Callable[[Fetcher], Awaitable[T]]) -> T:
        fetcher = Fetcher(self.wire, self._cache, self._route, self.job.token)
        try:
            return await once(fetcher)
        except FencedError:
            raise
        except TuningAPIError as error:
            raise as_failure(error, lambda said: f"an input could not be fetched: {said}") from None

    @property
    def _cache(self) -> Cache:
        if self.site is not None:
            return self.site.cache
        return Cache(self.attempt_dir / "inputs" / "cache", 0)

    def _drop(self, listing: RemoteFolder) -> None:
        """What is in the cache is not what it should be: the next one fetches it anew."""
        for file in listing.files:
            self._cache.drop(file.sha256)

    def _place(self, name: str) -> Path:
        return self.attempt_dir / "inputs" / name


def _is_usable(model: Path, has_same_paths: bool) -> bool:
    """Whether it can be used where it lies, and what it stands on, too."""
    adapter = model / _ADAPTER
    if not adapter.is_file():
        return (model / "config.json").is_file()
    try:
        base = json.loads(adapter.read_bytes())["base_model_name_or_path"]
        return has_same_paths and (Path(base) / "config.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return True  # for the trainer to tell what is wrong with it


def _tuned(listing: InputListing) -> RemoteModel:
    return RemoteModel(model=listing.model, base=listing.base)


def _rewarding(name: str) -> Pick:
    return lambda listing: listing.reward_models[name]


def _starts_anew(job: Assignment) -> Notice:
    start = "from where the job was asked to begin" if job.resume_from else "from the beginning"
    return Notice(
        level="warning",
        code="checkpoint_missing",
        message=f"no checkpoint of the job can be used any more; it starts {start}",
    )


def _stand_on(adapter: Path, base: Path) -> None:
    """Have an adapter's configuration name the base's folder here, in a file of its own."""
    try:
        config = json.loads(adapter.read_bytes())
        config["base_model_name_or_path"] = str(base)
    except (ValueError, TypeError):
        return  # for the trainer to tell what is wrong with it
    adapter.unlink()
    adapter.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

"""A model that only the hub has: what it is, asked within seconds, before a job is accepted."""

import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from tunesmith.errors import NoSpaceError, NotFoundError
from tunesmith.hub.cache import Snapshot, is_commit, is_hub_id, place
from tunesmith.hub.folder import ModelFolder, read
from tunesmith.settings import Settings

T = TypeVar("T")

CONNECT_SECONDS = 2.0
TOTAL_SECONDS = 5.0
MAX_INFO_BYTES = 16 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_FILES = 4096
_MAX_FILE_BYTES = 1 << 45
_CONFIGS = ("config.json", "tokenizer_config.json")
"""Looked into before the job is accepted: both may ask for code to be run."""
_WANTED = {
    *_CONFIGS,
    "generation_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_BYTES_EACH = {"float32": 4, "float16": 2, "bfloat16": 2}
LOCAL_COPY = "or register a local copy: tunesmith models add NAME PATH"


class HubRefusal(Exception):
    """Why the hub gave nothing: a sentence that begins with `the hub`."""

    def __init__(self, message: str, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final
        """Whether asking again is of no use."""


@dataclass(frozen=True)
class RemoteFile:
    name: str
    """At the top of the repository, so without a slash."""
    size: int
    sha256: str | None
    """Where the hub says it: of large files."""


@dataclass(frozen=True)
class RemoteModel:
    snapshot: Snapshot
    files: tuple[RemoteFile, ...]
    """Those that a download brings."""
    has_pickles: bool
    parameters: int
    """As the hub counted them; 0 where it did not."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def weights(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if file.name.endswith(".safetensors"))


def find(settings: Settings, repo: str, field: str) -> ModelFolder | None:
    """The folder that a download will make of a repository; None for what is no hub id.

    Raises NotFoundError where the hub does not give it, BadRequestError where it is no model for
    us (as a local folder would), NoSpaceError where it does not fit on the disk.
    """
    if not is_hub_id(repo):
        return None
    missing = (
        f"{field}: no model {repo!r}: not a folder in the workspace, not a registered name, not in "
        "the local hub cache"
    )
    if not settings.should_ask_hub:
        raise NotFoundError(
            f"{missing}, and the hub is not asked (HF_HUB_OFFLINE, or TUNESMITH_SHOULD_ASK_HUB); "
            "give a local folder, " + LOCAL_COPY,
            param=field,
        )
    try:
        model, configs = within(TOTAL_SECONDS, lambda: _look(settings, repo))
    except HubRefusal as refusal:
        raise NotFoundError(f"{missing}, and {refusal}; {LOCAL_COPY}", param=field) from None
    except TimeoutError:
        raise NotFoundError(
            f"{missing}, and the hub at {endpoint(settings)} did not answer within "
            f"{TOTAL_SECONDS:.0f} seconds; try again, {LOCAL_COPY}",
            param=field,
        ) from None
    folder = _expected(model, configs, field)
    _refuse_full_disk(settings, model)
    return folder


def ask(settings: Settings, repo: str, commit: str | None = None) -> RemoteModel:
    """A repository's newest commit and its files, or those of one commit. Raises HubRefusal."""
    with open_client(settings) as client:
        return _ask(client, settings, repo, commit, time.monotonic() + 6 * TOTAL_SECONDS)


def endpoint(settings: Settings) -> str:
    return settings.hub_endpoint.rstrip("/")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Its result, or TimeoutError."""
    return started(work).result(seconds)


def started(work: Callable[[], T]) -> "Future[T]":
    """In a thread of its own that nobody waits for: a name server that hangs holds up no other."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="hub-ask", daemon=True).start()
    return future


def _look(settings: Settings, repo: str) -> tuple[RemoteModel, dict[str, bytes]]:
    deadline = time.monotonic() + TOTAL_SECONDS
    with open_client(settings) as client:
        model = _ask(client, settings, repo, None, deadline)
        base = f"{endpoint(settings)}/{repo}/resolve/{model.snapshot.commit}"
        names = [file.name for file in model.files if file.name in _CONFIGS]
        configs = {
            name: read_body(client, settings, repo, f"{base}/{name}", MAX_CONFIG_BYTES, deadline)
            for name in names
        }
    return model, configs


def open_client(settings: Settings) -> httpx2.Client:
    token = settings.hub_token.get_secret_value()
    return httpx2.Client(
        timeout=httpx2.Timeout(TOTAL_SECONDS, connect=CONNECT_SECONDS),
        headers={"authorization": f"Bearer {token}"} if token else {},
        follow_redirects=True,
        max_redirects=5,
    )


def _ask(
    client: httpx2.Client, settings: Settings, repo: str, commit: str | None, deadline: float
) -> RemoteModel:
    url = f"{endpoint(settings)}/api/models/{repo}" + (f"/revision/{commit}" if commit else "")
    body = read_body(client, settings, repo, f"{url}?blobs=true", MAX_INFO_BYTES, deadline)
    try:
        return _parse(json.loads(body), settings.hub_cache, repo)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HubRefusal(
            f"the hub at {endpoint(settings)} answered what no hub answers; check the address",
            is_final=False,
        ) from None


def read_body(
    client: httpx2.Client, settings: Settings, repo: str, url: str, limit: int, deadline: float
) -> bytes:
    """A body of at most `limit` bytes. Raises HubRefusal."""
    found = bytearray()
    try:
        with client.stream("GET", url) as response:
            if response.status_code != 200:
                raise as_refusal(settings, repo, response)
            for block in response.iter_bytes():
                found += block
                if len(found) > limit:
                    raise HubRefusal(f"the hub sent over {limit >> 20} MB for {repo!r}", True)
                if time.monotonic() > deadline:
                    raise HubRefusal("the hub sends too slowly", False)
    except httpx2.HTTPError as error:
        raise HubRefusal(
            f"the hub at {endpoint(settings)} cannot be reached ({type(error).__name__}); try "
            "again when it can",
            is_final=False,
        ) from None
    return bytes(found)


def as_refusal(settings: Settings, repo: str, response: httpx2.Response) -> HubRefusal:
    place, status = endpoint(settings), response.status_code
    if response.headers.get("x-error-code") == "GatedRepo":
        return HubRefusal(
            f"the hub at {place} gates it: accept its conditions there, and start the server with "
            "the HF_TOKEN of an account that may read it",
            is_final=True,
        )
    if status == 404:
        return HubRefusal(f"the hub at {place} has none of that name", is_final=True)
    if status in (401, 403):
        return HubRefusal(
            f"the hub at {place} has none of that name that we may see ({status}): a private one "
            "needs a server started with HF_TOKEN",
            is_final=True,
        )
    return HubRefusal(f"the hub at {place} answered {status}; try again later", is_final=False)


def _parse(info: Any, cache: Path, repo: str) -> RemoteModel:
    """Raises ValueError, KeyError, TypeError for what is no answer of a hub."""
    commit, siblings = info["sha"], info["siblings"]
    if not is_commit(commit) or len(siblings) > 50 * MAX_FILES:
        raise ValueError
    names = {entry["rfilename"] for entry in siblings}
    wanted = {name for name in names if name in _WANTED} | _weights(names)
    if len(wanted) > MAX_FILES:
        raise ValueError
    counted = (info.get("safetensors") or {}).get("total")
    return RemoteModel(
        snapshot=Snapshot(cache, repo, commit),
        files=tuple(file_of(entry) for entry in siblings if entry["rfilename"] in wanted),
        has_pickles=any("/" not in name and name.endswith(_PICKLES) for name in names),
        parameters=counted if type(counted) is int and 0 < counted < _MAX_FILE_BYTES else 0,
    )


def _weights(names: set[str]) -> set[str]:
    """The one set of weights that is loaded, where a repository has several."""
    found = {name for name in names if name.endswith(".safetensors") and _NAME.fullmatch(name)}
    shards = {name for name in found if _SHARD.fullmatch(name)}
    if "model.safetensors" in found:
        return {"model.safetensors"}
    return shards or found


def file_of(entry: dict[str, Any]) -> RemoteFile:
    large = entry.get("lfs") or {}
    size, sha256 = large.get("size", entry.get("size")), large.get("sha256")
    if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES:
        raise ValueError
    if sha256 is not None and re.fullmatch(r"[0-9a-f]{64}", sha256) is None:
        raise ValueError
    return RemoteFile(entry["rfilename"], size, sha256)


def _expected(model: RemoteModel, configs: dict[str, bytes], field: str) -> ModelFolder:
    """What the folder will be. A sketch of it without weights goes through the local check."""
    place = model.snapshot.folder
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as room:
        sketch = Path(room) / model.snapshot.repo.rpartition("/")[2]
        sketch.mkdir()
        for name, body in configs.items():
            (sketch / name).write_bytes(body)
        if any(file.name == "tokenizer.json" for file in model.files):
            (sketch / "tokenizer.json").touch()
        if model.has_pickles and not model.weights:
            (sketch / "pytorch_model.bin").touch()
        found = read(sketch, field)
    weight_bytes = sum(file.size for file in model.weights)
    return replace(
        found,
        path=place,
        base=place,
        parameters=model.parameters or _parameters(weight_bytes, found.config),
        weight_bytes=weight_bytes,
        has_weights=bool(model.weights),
        files=(),
    )


def _parameters(weight_bytes: int, config: dict[str, Any]) -> int:
    """From the files' sizes: rather too many than too few."""
    told = config.get("dtype", config.get("torch_dtype"))
    each = _BYTES_EACH.get(told, 2) if isinstance(told, str) else 2
    return weight_bytes // each


def _refuse_full_disk(settings: Settings, model: RemoteModel) -> None:
    folder = place(settings.hub_cache)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < model.size_bytes:
        raise NoSpaceError(
            f"{model.snapshot.repo} is {model.size_bytes / 1e9:.2f} GB to download, the disk of "
            f"the hub's cache has {free / 1e9:.2f} GB left; free some and submit again"
        )

"""A data set that only the hub has: one file of rows, fetched into the store of contents.

`org/name` is the repository's one file of rows, or the one for training; `org/name/<path>` is that
file. A submit waits some seconds for its bytes; where they take longer it is answered that they are
on their way, and the next one finds them.
"""

import hashlib
import json
import re
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx2

from tunesmith.errors import (
    BadRequestError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
)
from tunesmith.hub import remote
from tunesmith.hub.cache import is_commit, is_hub_id
from tunesmith.hub.names import DATA_SUFFIXES, FoundData
from tunesmith.hub.remote import TOTAL_SECONDS, HubRefusal, RemoteFile
from tunesmith.store import catalog
from tunesmith.store.files import Blob

if TYPE_CHECKING:
    from tunesmith.hub import Hub

PATIENCE_SECONDS = 15.0
STALL_SECONDS = 60.0
AT_ONCE = 4
"""Files on their way: each has a thread, and may fill the disk."""
MAX_FILES = 50_000
_SHOWN = 8
_OURS = ("data", "datasets")
"""Folders of the workspace, that no organisation is called."""
_TOLD = ("dataset_info.json", "dataset_infos.json", "state.json")
"""About the rows, not of them."""
_FOR_TRAINING = re.compile(r"(^|[/_.\-])train([/_.\-]|$)")


@dataclass(frozen=True)
class Wanted:
    repo: str
    commit: str
    file: RemoteFile

    @property
    def key(self) -> str:
        return f"hub-data:{self.repo}@{self.commit}/{self.file.name}"


class RemoteData:
    """One a server; `find` is called on any thread and may block."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._turn = threading.Lock()
        self._under_way: dict[str, Future[Blob]] = {}

    def find(self, name: str, field: str) -> FoundData | None:
        """None for what is no name of the hub's. Raises NotFoundError where the hub does not give
        it, BadRequestError, PayloadTooLargeError, and NotReadyError while it is on its way."""
        repo, inner = _parts(name)
        if repo is None or not self._hub.settings.should_ask_hub:
            return None
        try:
            wanted = remote.within(TOTAL_SECONDS, lambda: self._look(repo, inner, field))
            blob = self._kept(wanted) or self._started(wanted, field).result(PATIENCE_SECONDS)
        except HubRefusal as refusal:
            raise NotFoundError(
                f"{field}: no data set {name!r} here, and {refusal}; or give a file of the "
                "workspace",
                param=field,
            ) from None
        except TimeoutError:
            raise NotReadyError(
                f"{field}: {name!r} is on its way from the hub; ask again in a moment"
            ) from None
        return FoundData(name, blob.path, PurePosixPath(wanted.file.name).suffix, blob.sha256)

    def _look(self, repo: str, inner: str, field: str) -> Wanted:
        settings = self._hub.settings
        url = f"{remote.endpoint(settings)}/api/datasets/{repo}?blobs=true"
        deadline = time.monotonic() + TOTAL_SECONDS
        with remote.open_client(settings) as client:
            body = remote.read_body(client, settings, repo, url, remote.MAX_INFO_BYTES, deadline)
        try:
            commit, files = _listed(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise HubRefusal("the hub answered what no hub answers", is_final=False) from None
        return Wanted(repo, commit, _chosen(repo, files, inner, field))

    def _kept(self, wanted: Wanted) -> Blob | None:
        body = self._hub.store.read(lambda tx: catalog.find_verdict(tx, wanted.key))
        if body is None:
            return None
        path = self._hub.blobs.path(str(body["sha256"]))
        return Blob(str(body["sha256"]), wanted.file.size, path) if path.is_file() else None

    def _started(self, wanted: Wanted, field: str) -> "Future[Blob]":
        """The fetching of it, which may have begun with another request."""
        most = self._hub.settings.max_upload_bytes
        if wanted.file.size > most:
            raise PayloadTooLargeError(
                f"{field}: {wanted.file.name} of {wanted.repo} has {wanted.file.size / 1e6:,.0f} "
                f"MB, over the {most / 1e6:,.0f} MB that this server takes; cut it, or put it "
                "into the workspace"
            )
        with self._turn:
            found = self._under_way.get(wanted.key)
            if found is None and len(self._under_way) >= AT_ONCE:
                raise NotReadyError(
                    f"{field}: {AT_ONCE} other data sets are on their way from the "
                    "hub; ask again in a moment"
                )
            if found is None:
                found = remote.started(lambda: self._fetch(wanted))
                self._under_way[wanted.key] = found
        return found

    def _fetch(self, wanted: Wanted) -> Blob:
        try:
            blob = self._receive(wanted)
            told = {"sha256": blob.sha256}
            self._hub.store.write(lambda tx: catalog.keep_verdict(tx, wanted.key, told)).result()
            return blob
        finally:
            with self._turn:
                self._under_way.pop(wanted.key, None)

    def _receive(self, wanted: Wanted) -> Blob:
        """Raises HubRefusal; what came of a file that breaks off, or is another, is gone."""
        settings = self._hub.settings
        place = f"{wanted.repo}/resolve/{wanted.commit}/{quote(wanted.file.name)}"
        limits = httpx2.Timeout(STALL_SECONDS, connect=remote.CONNECT_SECONDS)
        try:
            with (
                remote.open_client(settings) as client,
                client.stream(
                    "GET", f"{remote.endpoint(settings)}/datasets/{place}", timeout=limits
                ) as response,
                self._hub.blobs.receive(wanted.file.size) as incoming,
            ):
                if response.status_code != 200:
                    raise remote.as_refusal(settings, wanted.repo, response)
                digest = hashlib.sha256()
                for block in response.iter_bytes():
                    digest.update(block)
                    incoming.write(block)
                is_other = wanted.file.sha256 not in (None, digest.hexdigest())
                if incoming.size_bytes != wanted.file.size or is_other:
                    raise HubRefusal("the hub sent other bytes than it announced", False)
                return incoming.commit()
        except (httpx2.HTTPError, PayloadTooLargeError) as error:
            raise HubRefusal(
                f"the hub broke off in {wanted.file.name} ({type(error).__name__})", False
            ) from None


def _parts(name: str) -> tuple[str | None, str]:
    """Repository and file. A path of the workspace that was mistyped is not asked of the hub."""
    org, _, rest = name.partition("/")
    repo, _, inner = rest.partition("/")
    is_path = org in _OURS or (not inner and repo.endswith(DATA_SUFFIXES))
    whole = f"{org}/{repo}"
    return (None, "") if is_path or not repo or not is_hub_id(whole) else (whole, inner)


def _listed(info: Any) -> tuple[str, list[RemoteFile]]:
    """Commit and files of rows. Raises ValueError, KeyError, TypeError for what is none."""
    commit, siblings = info["sha"], info["siblings"]
    if not is_commit(commit) or len(siblings) > MAX_FILES:
        raise ValueError
    return commit, [
        remote.file_of(entry) for entry in siblings if _is_of_rows(str(entry["rfilename"]))
    ]


def _is_of_rows(name: str) -> bool:
    path = PurePosixPath(name)
    is_plain = not any(part.startswith(".") or part == ".." for part in path.parts)
    is_safe = is_plain and name.isprintable() and len(name) <= 1000
    return is_safe and path.suffix in DATA_SUFFIXES and path.name not in _TOLD


def _chosen(repo: str, files: list[RemoteFile], inner: str, field: str) -> RemoteFile:
    named = {file.name: file for file in files}
    if inner in named:
        return named[inner]
    training = [file for file in files if _FOR_TRAINING.search(PurePosixPath(file.name).as_posix())]
    for some in (files, training):
        if len(some) == 1 and not inner:
            return some[0]
    listed = ", ".join(sorted(named)[:_SHOWN]) + (", …" if len(named) > _SHOWN else "")
    if not named:
        raise NotFoundError(
            f"{field}: the hub's {repo} has no file that ends in {', '.join(DATA_SUFFIXES)}",
            param=field,
        )
    if inner:
        raise NotFoundError(f"{field}: the hub's {repo} has no {inner!r}: {listed}", param=field)
    raise BadRequestError(
        f"{field}: the hub's {repo} has {len(named)} files of rows; write which one, as "
        f"{repo}/{sorted(named)[0]}: {listed}",
        param=field,
    )

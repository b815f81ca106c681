"""Checkpoints and models whose bytes are in the object store, told of here by a note each.

<house>/<job>/<fence>/<manifest's SHA-256>/<piece>, and `manifest.json` last. Objects that no upload
under way and no note means are cleared away. All of it blocks: call it on a thread.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tunesmith import manifest
from tunesmith.errors import NotReadyError
from tunesmith.hub import incoming
from tunesmith.hub.incoming import INCOMING, STORED, Stored, Upload
from tunesmith.manifest import MANIFEST
from tunesmith.spec.transfer import (
    URLS_A_TIME,
    PieceUrl,
    RemoteFile,
    RemoteFolder,
    UploadPlan,
    UrlPart,
    pieces,
)
from tunesmith.store.objects import Objects, ObjectsFailed
from tunesmith.store.space import told_as_no_space

log = logging.getLogger(__name__)


class Elsewhere:
    """One a server, where TUNESMITH_OBJECT_STORE_URL is set. Raises NotReadyError while the store
    does not answer."""

    def __init__(self, objects: Objects, house_id: str, jobs: Path) -> None:
        """`jobs` is the folder of all jobs' attempts."""
        self._objects, self._jobs = objects, jobs
        self._house = hashlib.sha256(house_id.encode()).hexdigest()[:16]
        """Not the id itself: who has that is taken for one that sees this disk."""

    def plan(self, upload: Upload) -> UploadPlan:
        """What is missing, with addresses for the first of it."""
        missing, prefix = self.missing(upload), self.prefix(upload)
        first = missing[:URLS_A_TIME]
        with told_as_away():
            urls = self._objects.sign("PUT", [f"{prefix}/{index}" for index in first])
        signed = (PieceUrl(index=index, url=url) for index, url in zip(first, urls, strict=True))
        return UploadPlan(missing=tuple(missing), urls=tuple(signed), is_elsewhere=True)

    def missing(self, upload: Upload) -> list[int]:
        prefix = self.prefix(upload)
        with told_as_away():
            there = self._objects.sizes(prefix)
        return [
            piece.index
            for piece in upload.pieces
            if there.get(f"{prefix}/{piece.index}") != piece.size
        ]

    def seal(self, upload: Upload) -> None:
        """The manifest goes last: what lacks it was never whole."""
        with told_as_away():
            self._objects.put(f"{self.prefix(upload)}/{MANIFEST}", upload.offer.manifest.encode())

    def as_remote(self, folder: Path, stored: Stored) -> RemoteFolder:
        """With signed addresses for every piece."""
        body = stored.manifest.encode()
        found = incoming.parsed(body)
        prefix, cut = stored.prefix, list(pieces(found))
        with told_as_away():
            urls = self._objects.sign("GET", [f"{prefix}/{piece.index}" for piece in cut])
            [own] = self._objects.sign("GET", [f"{prefix}/{MANIFEST}"])
        parts: dict[str, list[UrlPart]] = {MANIFEST: [UrlPart(size=len(body), url=own)]}
        for piece, url in zip(cut, urls, strict=True):
            parts.setdefault(piece.path, []).append(UrlPart(size=piece.size, url=url))
        files: tuple[RemoteFile, ...] = incoming.listed(found, body)
        return RemoteFolder(
            name=str(folder),
            files=tuple(
                file.model_copy(update={"parts": tuple(parts.get(file.name, ()))}) for file in files
            ),
        )

    def bring_here(self, folder: Path) -> None:
        """Fetch a folder, verify it, and put it in the place of its note. Done again, it is done.

        Raises NotReadyError, NoSpaceError, BrokenManifest.
        """
        staging, aside = folder.with_name(f".{folder.name}.part"), _aside(folder)
        if not folder.exists() and aside.exists():
            os.rename(aside, folder)  # a crash came between the two names
        stored = incoming.stored(folder)
        if stored is None:
            return
        sha256 = incoming.digest_of(folder)
        with told_as_no_space():
            shutil.rmtree(staging, ignore_errors=True)
            self._download(stored, staging)
            manifest.verify(staging, sha256)
            _sync(staging)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
            os.rename(staging, folder)
            manifest.fsync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def forget(self, folder: Path) -> None:
        """Take a note's objects away, as far as the store lets us; the rest goes with `clear`."""
        stored = incoming.stored(folder)
        if stored is None:
            return
        try:
            self._objects.remove(list(self._objects.sizes(stored.prefix)))
        except ObjectsFailed as error:
            log.warning("objects under %s are left for later: %s", stored.prefix, error)

    def clear(self) -> int:
        """Take away what nothing here speaks of. Returns how many objects that were."""
        found: dict[tuple[str, ...], list[str]] = {}
        gone = 0
        with told_as_away():
            for key in self._objects.sizes(self._house):
                found.setdefault(tuple(key.split("/")[1:4]), []).append(key)
            for mark, keys in found.items():
                if not self._speaks_of(mark):
                    self._objects.remove(keys)
                    gone += len(keys)
        return gone

    def _speaks_of(self, mark: tuple[str, ...]) -> bool:
        """Whether an upload under way, or a note in a folder's place, means these objects."""
        if len(mark) != 3:
            return True  # nothing that we made
        job_id, fence, sha256 = mark
        place = self._jobs / job_id / "attempts" / fence
        if (place / INCOMING / sha256).exists():
            return True
        notes = (*place.glob(f"*/{STORED}"), *place.glob(f"*/*/{STORED}"))
        return any(incoming.digest_of(note.parent) == sha256 for note in notes)

    def prefix(self, upload: Upload) -> str:
        job_id, _, fence = upload.attempt_dir.relative_to(self._jobs).parts[:3]
        return f"{self._house}/{job_id}/{fence}/{upload.sha256}"

    def _download(self, stored: Stored, staging: Path) -> None:
        found = incoming.parsed(stored.manifest.encode())
        staging.mkdir(parents=True)
        for entry in found.files:
            (staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (staging / entry.path).touch()
        with told_as_away():
            for piece in pieces(found):
                with (staging / piece.path).open("ab") as file:
                    for block in self._objects.read(f"{stored.prefix}/{piece.index}"):
                        file.write(block)
        (staging / MANIFEST).write_bytes(stored.manifest.encode())


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.note")


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def told_as_away() -> Iterator[None]:
    """The store's trouble is a reason to ask again later."""
    try:
        yield
    except ObjectsFailed as error:
        log.error("the object store: %s", error)
        raise NotReadyError(f"the object store does not do its work: {error}") from None

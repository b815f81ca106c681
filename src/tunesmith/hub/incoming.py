"""A sealed folder on its way in from another host, in pieces: whole, or not there at all.

<attempt>/.incoming/<manifest's SHA-256>/offer.json   what is coming
                                         files/…      pieces in their places
                                         done/<index> a piece that is on the disk
                                         <random>.part  one that is still coming
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError as Invalid

from tunesmith import manifest
from tunesmith.errors import (
    BadRequestError,
    ConflictError,
    NoSpaceError,
    NotFoundError,
    PayloadTooLargeError,
)
from tunesmith.manifest import MANIFEST, BrokenManifest, Manifest
from tunesmith.spec.strict import Strict
from tunesmith.spec.transfer import Offer, Piece, RemoteFile, checked_manifest, pieces
from tunesmith.store.space import told_as_no_space

INCOMING = ".incoming"
STORED = "stored.json"
_OFFER, _FILES, _DONE = "offer.json", "files", "done"


class Stored(Strict):
    """What stands in a folder's place here, where its bytes are in the object store."""

    manifest: str
    prefix: str
    """Of its objects' names."""


@dataclass(frozen=True)
class Upload:
    folder: Path
    """Where it is gathered."""
    offer: Offer
    manifest: Manifest
    pieces: tuple[Piece, ...]

    @property
    def sha256(self) -> str:
        return self.folder.name

    @property
    def attempt_dir(self) -> Path:
        return self.folder.parents[1]

    @property
    def target(self) -> Path:
        if self.offer.kind == "artifact":
            return self.attempt_dir / "artifact"
        return self.attempt_dir / "checkpoints" / f"step-{self.offer.step}"

    def missing(self) -> list[int]:
        done = self.folder / _DONE
        there = set(os.listdir(done)) if done.is_dir() else set()
        return [piece.index for piece in self.pieces if str(piece.index) not in there]

    def piece(self, index: int) -> Piece:
        """Raises NotFoundError."""
        if not 0 <= index < len(self.pieces):
            raise NotFoundError(f"this upload has {len(self.pieces)} pieces; there is no {index}")
        return self.pieces[index]

    def receive(self, index: int) -> "ComingPiece":
        """Use it as a context, and `commit` inside."""
        return ComingPiece(self, self.piece(index))

    def commit(self) -> Path:
        """Verify every byte and give the folder its name. Blocks long; done again, it is done.

        Raises ConflictError where pieces are missing, BadRequestError where the bytes are not what
        the manifest says: then it has to be sent anew.
        """
        with told_as_no_space(), _alone(self.folder.parent):
            if self.is_there():
                self.forget()
                return self.target
            if missing := self.missing():
                raise ConflictError(f"{len(missing)} pieces are missing, the first is {missing[0]}")
            self._gather()
            self._give_name()
            self.forget()
        return self.target

    def commit_elsewhere(self, prefix: str) -> Path:
        """Its bytes are in the object store, all of them: a note of that takes the name."""
        with told_as_no_space(), _alone(self.folder.parent):
            if not self.is_there():
                files = self.folder / _FILES
                files.mkdir(exist_ok=True)
                note = Stored(manifest=self.offer.manifest, prefix=prefix)
                manifest.write_durably(files / STORED, note.model_dump_json().encode())
                self._give_name()
            self.forget()
        return self.target

    def is_there(self) -> bool:
        """Whether the very same folder has its name already."""
        return digest_of(self.target) == self.sha256

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def place(self, name: str) -> Path:
        return self.folder / _FILES / name

    def mark(self, index: int) -> Path:
        return self.folder / _DONE / str(index)

    def _gather(self) -> None:
        files = self.folder / _FILES
        for entry in self.manifest.files:
            if entry.size == 0:  # no piece made it
                self.place(entry.path).parent.mkdir(parents=True, exist_ok=True)
                self.place(entry.path).touch()
        files.mkdir(exist_ok=True)
        manifest.write_durably(files / MANIFEST, self.offer.manifest.encode())
        try:
            manifest.verify(files, self.sha256)
        except BrokenManifest as broken:
            self.forget()
            raise BadRequestError(f"what came is not what its manifest says: {broken}") from None
        for inner in sorted({path.parent for path in files.rglob("*")} | {files}):
            manifest.fsync_folder(inner)

    def _give_name(self) -> None:
        if self.target.exists():
            manifest.remove(self.target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.folder / _FILES, self.target)
        manifest.fsync_folder(self.target.parent)


class ComingPiece:
    """Bytes of one piece: they go to their place only once all are there and their digest fits."""

    def __init__(self, upload: Upload, piece: Piece) -> None:
        self._upload, self._piece = upload, piece
        self._part = upload.folder / f"{secrets.token_hex(8)}.part"
        self._file: BinaryIO | None = None
        self._digest, self._size = hashlib.sha256(), 0

    def __enter__(self) -> "ComingPiece":
        with told_as_no_space(), _told_as_gone():
            self._file = self._part.open("x+b")
        return self

    def write(self, block: bytes) -> None:
        """Raises PayloadTooLargeError, NoSpaceError."""
        assert self._file is not None
        self._size += len(block)
        if self._size > self._piece.size:
            raise PayloadTooLargeError(
                f"piece {self._piece.index} has {self._piece.size} bytes, and more came"
            )
        self._digest.update(block)
        with told_as_no_space():
            self._file.write(block)

    def commit(self, sha256: str) -> None:
        """Raises BadRequestError where the bytes are not those that were announced."""
        assert self._file is not None
        index, size = self._piece.index, self._piece.size
        if self._size != size:
            raise BadRequestError(f"piece {index} has {size} bytes, and {self._size} came")
        if self._digest.hexdigest() != sha256:
            raise BadRequestError(f"piece {index} came with other bytes than were sent")
        with told_as_no_space(), _told_as_gone():
            self._file.flush()
            self._put()
            self._upload.mark(index).touch()

    def _put(self) -> None:
        assert self._file is not None
        place = self._upload.place(self._piece.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            self._file.seek(0)
            offset = self._piece.offset
            while block := self._file.read(1 << 20):
                offset += os.pwrite(target, block, offset)
            os.fsync(target)
        finally:
            os.close(target)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._part.unlink(missing_ok=True)


def stored(folder: Path) -> Stored | None:
    """The note of a folder whose bytes are in the object store; None where they are here."""
    try:
        return Stored.model_validate_json((folder / STORED).read_bytes())
    except (OSError, ValueError):
        return None


def digest_of(folder: Path) -> str | None:
    """Of the manifest of a folder, wherever its bytes are; None where it has none."""
    try:
        return hashlib.sha256(manifest_text(folder)).hexdigest()
    except (OSError, ValueError):
        return None


def manifest_text(folder: Path) -> bytes:
    """Raises OSError, ValueError where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / MANIFEST).read_bytes()
    note = Stored.model_validate_json((folder / STORED).read_bytes())
    return note.manifest.encode()


def parsed(body: bytes) -> Manifest:
    """Of a checkpoint that is to be sent. Raises NotFoundError where it can't be."""
    try:
        return checked_manifest(body.decode(), 1 << 62)
    except ValueError:
        raise NotFoundError("that checkpoint's manifest cannot be read") from None


def listed(found: Manifest, body: bytes) -> tuple[RemoteFile, ...]:
    """A folder's files, then its manifest, whose text is `body`."""
    files = [
        RemoteFile(name=entry.path, size=entry.size, sha256=entry.sha256) for entry in found.files
    ]
    own = RemoteFile(name=MANIFEST, size=len(body), sha256=hashlib.sha256(body).hexdigest())
    return (*files, own)


def file_in(folder: Path, manifest_sha256: str, sha256: str) -> Path | None:
    """A file of a sealed folder that lies here, by its bytes."""
    try:
        body = (folder / MANIFEST).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest() != manifest_sha256:
        return None
    if sha256 == manifest_sha256:
        return folder / MANIFEST
    found = (folder / entry.path for entry in parsed(body).files if entry.sha256 == sha256)
    return next(found, None)


def begin(attempt_dir: Path, offer: Offer, max_bytes: int, is_elsewhere: bool = False) -> Upload:
    """Write down what is coming; asked again, it is the same upload.

    Raises BadRequestError, PayloadTooLargeError, NoSpaceError.
    """
    sha256 = hashlib.sha256(offer.manifest.encode()).hexdigest()
    folder = attempt_dir / INCOMING / sha256
    known = find(attempt_dir, sha256)
    if known is not None and known.offer == offer:
        return known
    upload = _upload(folder, offer, max_bytes)
    with told_as_no_space():
        (folder / _DONE).mkdir(parents=True, exist_ok=True)
        if not upload.is_there() and not is_elsewhere:
            _refuse_full_disk(folder, upload.manifest.size_bytes)
        manifest.write_durably(folder / _OFFER, offer.model_dump_json().encode())
    return upload


def find(attempt_dir: Path, sha256: str) -> Upload | None:
    """One that was begun before."""
    place = attempt_dir / INCOMING / sha256 / _OFFER
    try:
        return _read(place, place.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=32)
def _read(place: Path, _stamp: int) -> Upload:
    offer = Offer.model_validate_json(place.read_bytes())
    return _upload(place.parent, offer, 1 << 62)


def _upload(folder: Path, offer: Offer, max_bytes: int) -> Upload:
    try:
        found = checked_manifest(offer.manifest, max_bytes)
    except Invalid as error:
        told = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise BadRequestError(f"manifest: {told['msg']}", param="manifest") from None
    except ValueError as error:
        raise BadRequestError(f"manifest: {error}", param="manifest") from None
    if found.kind != offer.kind:
        raise BadRequestError("manifest: it is of another kind than the offer", param="kind")
    return Upload(folder, offer, found, tuple(pieces(found)))


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise NoSpaceError(
            f"{size / 1e9:.2f} GB are coming from another host, the workspace's disk has "
            f"{free / 1e9:.2f} GB left"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of all threads and processes, on this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told_as_gone() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError("this upload is over; offer it again") from None

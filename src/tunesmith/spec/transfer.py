"""What goes between the API and a worker that does not see the workspace's folder.

GET  …/attempts/{job}/{fence}/inputs                       → InputListing
GET  …/attempts/{job}/{fence}/checkpoints/{manifest}       → RemoteFolder   an accepted one
GET  …/attempts/{job}/{fence}/files/{sha256}               → bytes, with Range
POST …/attempts/{job}/{fence}/uploads            Offer     → UploadPlan     again and again
PUT  …/attempts/{job}/{fence}/uploads/{manifest}/{piece}   → 204            where the API keeps it
POST …/attempts/{job}/{fence}/uploads/{manifest}/commit    → Committed      may be asked again
POST …/attempts/{job}/{fence}/log?offset=N                 → LogTaken       bytes of the job's log

All with the attempt's token; 409 with code `fenced` where another attempt owns the job.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from tunesmith.manifest import MANIFEST, Manifest
from tunesmith.spec.strict import Sha256, Strict

PIECE_BYTES = 32 << 20
MAX_FILES = 10_000
MAX_PIECES = 20_000
MAX_DEPTH = 16
MAX_MANIFEST_BYTES = 8 << 20
MAX_LOG_BYTES = 1 << 20
"""Of a job's log, in one request."""
URLS_A_TIME = 64
"""Signed addresses in one answer; they do not last."""
DIGEST_HEADER = "content-digest"
"""Of a piece: `sha-256=:<base64>:` (RFC 9530)."""

FileName = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class UrlPart(Strict):
    """A stretch of a file that lies elsewhere, in order."""

    size: int = Field(ge=1, le=PIECE_BYTES)
    url: str = Field(max_length=8192)


class RemoteFile(Strict):
    name: FileName
    """Relative to its folder, with forward slashes."""
    size: int = Field(ge=0, le=1 << 50)
    sha256: Sha256
    parts: tuple[UrlPart, ...] = Field((), max_length=MAX_PIECES)
    """Empty: ask the API for it by its digest."""

    @model_validator(mode="after")
    def _is_inside(self) -> "RemoteFile":
        check_name(self.name)
        return self


class RemoteFolder(Strict):
    name: str = Field("", max_length=4096)
    """What results call it: its path where the API is, or what an adapter calls its base."""
    files: tuple[RemoteFile, ...] = Field(max_length=MAX_FILES)


class RemoteModel(Strict):
    model: RemoteFolder
    base: RemoteFolder | None = None
    """What it stands on, where it is an adapter."""


class InputListing(Strict):
    model: RemoteFolder
    base: RemoteFolder | None = None
    """What the model stands on, where that is an adapter."""
    dataset: RemoteFile
    eval_dataset: RemoteFile | None = None
    reward_models: dict[str, RemoteModel] = {}
    """By the name in the specification."""
    tokenizer: RemoteFile | None = None
    resume_from: RemoteFolder | None = None


class Offer(Strict):
    """A sealed folder that a worker wants to send."""

    kind: Literal["checkpoint", "artifact"]
    step: int = Field(0, ge=0, le=1 << 53)
    """Of a checkpoint."""
    manifest: str = Field(max_length=MAX_MANIFEST_BYTES)
    """The text of its manifest file, to the letter: its digest names the upload."""


class PieceUrl(Strict):
    index: int = Field(ge=0)
    url: str = Field(max_length=8192)


class UploadPlan(Strict):
    """What is still wanted. With `urls`, pieces go there; some may be missing: ask again."""

    missing: tuple[int, ...] = Field(max_length=MAX_PIECES)
    urls: tuple[PieceUrl, ...] = Field((), max_length=URLS_A_TIME)
    is_elsewhere: bool = False
    """Whether pieces go to `urls` only."""


class Committed(Strict):
    path: str
    """Where the folder is, as the API names it."""


class LogTaken(Strict):
    offset: int = Field(ge=0)
    """Bytes of the attempt's log that the API has."""


@dataclass(frozen=True)
class Piece:
    """A stretch of one of a manifest's files."""

    index: int
    path: str
    offset: int
    size: int


def pieces(manifest: Manifest) -> Iterator[Piece]:
    """The same for everybody: each file of the manifest in order, cut every PIECE_BYTES."""
    index = 0
    for entry in manifest.files:
        for offset in range(0, entry.size, PIECE_BYTES):
            yield Piece(index, entry.path, offset, min(PIECE_BYTES, entry.size - offset))
            index += 1


def check_name(name: str) -> None:
    """Raises ValueError for what is no plain relative path."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts):
        raise ValueError(f"{name[:100]!r} is no relative path without empty parts, . or ..")
    is_plain = all(unicodedata.category(letter) not in ("Cc", "Cs") for letter in name)
    if "\\" in name or not is_plain or len(parts) > MAX_DEPTH:
        raise ValueError(f"{name[:100]!r} holds a backslash or a control character, or is too deep")


def checked_manifest(text: str, max_bytes: int) -> Manifest:
    """Raises ValueError with what is wrong: names, counts, sizes."""
    manifest = Manifest.model_validate_json(text)
    names = [entry.path for entry in manifest.files]
    for name in names:
        check_name(name)
    if len(names) > MAX_FILES:
        raise ValueError(f"{len(names)} files; {MAX_FILES} is the limit")
    taken = set(names)
    if len(taken) < len(names):
        raise ValueError("a file is listed twice")
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if MANIFEST in taken | folders or taken & folders:
        raise ValueError("a name is both a file and a folder, or the manifest's own")
    if manifest.size_bytes > min(max_bytes, MAX_PIECES * PIECE_BYTES):
        raise ValueError(f"{manifest.size_bytes} bytes; {max_bytes} is the limit of this server")
    return manifest

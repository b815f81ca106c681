"""When a folder counts as whole: a manifest of sizes and digests, written last, then a rename.

Staging folder → every file fsynced → manifest written and fsynced → folder fsynced → renamed →
parent fsynced. A folder without a manifest that verifies was never finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(max_length=1000)
    """Relative, with forward slashes."""
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = 1
    kind: str = Field(max_length=40)
    """`checkpoint` or `artifact`."""
    files: tuple[FileEntry, ...]
    detail: dict[str, Any] = {}

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


class BrokenManifest(Exception):
    """The folder is not what its manifest says; the message names the first difference."""


def commit(staging: Path, final: Path, kind: str, detail: dict[str, Any] | None = None) -> str:
    """Make `staging` durable, seal it and rename it to `final`, which must not exist.

    Returns the SHA-256 of the manifest's bytes. Raises OSError (ENOSPC for one) with `final`
    untouched.
    """
    digest = seal(staging, kind, detail)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(staging, final)
    fsync_folder(final.parent)
    return digest


def seal(folder: Path, kind: str, detail: dict[str, Any] | None = None) -> str:
    """Fsync every file, write the manifest, fsync the folders. Returns the manifest's SHA-256."""
    entries = tuple(
        FileEntry(path=name, size=size, sha256=digest)
        for name, size, digest in _measure(folder, should_sync=True)
    )
    manifest = Manifest(kind=kind, files=entries, detail=detail or {})
    body = json.dumps(manifest.model_dump(), sort_keys=True, indent=1).encode()
    write_durably(folder / MANIFEST, body)
    for inner in sorted({path.parent for path in folder.rglob("*")} | {folder}):
        fsync_folder(inner)
    return hashlib.sha256(body).hexdigest()


def verify(folder: Path, manifest_sha256: str | None = None) -> Manifest:
    """Read every byte of `folder` against its manifest. Raises BrokenManifest."""
    try:
        body = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BrokenManifest(f"{folder.name}: no readable manifest ({error.strerror})") from None
    if manifest_sha256 is not None and hashlib.sha256(body).hexdigest() != manifest_sha256:
        raise BrokenManifest(f"{folder.name}: the manifest is not the one that was reported")
    try:
        manifest = Manifest.model_validate_json(body)
    except ValueError:
        raise BrokenManifest(f"{folder.name}: the manifest cannot be read") from None
    try:
        found = {name: (size, digest) for name, size, digest in _measure(folder)}
    except OSError as error:
        raise BrokenManifest(f"{folder.name}: {error.strerror}") from None
    for entry in manifest.files:
        if found.pop(entry.path, None) != (entry.size, entry.sha256):
            raise BrokenManifest(f"{folder.name}: {entry.path} is missing or changed")
    if found:
        raise BrokenManifest(f"{folder.name}: {sorted(found)[0]} is not in the manifest")
    return manifest


def is_sealed(folder: Path) -> bool:
    """Whether a folder carries a manifest of ours (its files are not read)."""
    try:
        Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return True


def write_durably(path: Path, body: bytes) -> None:
    """Write a whole file, or leave the old one: temporary name, fsync, rename, fsync the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Take a sealed folder away so that a crash half-way never leaves one that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _measure(folder: Path, should_sync: bool = False) -> Iterator[tuple[str, int, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise OSError(f"{path.name} is a link")
        if path.is_dir() or path == folder / MANIFEST:
            continue
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
            if should_sync:
                os.fsync(file.fileno())
        yield path.relative_to(folder).as_posix(), size, digest.hexdigest()

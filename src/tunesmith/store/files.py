"""Files from outside: where a request may point to, and the store of uploaded bytes."""

import contextlib
import hashlib
import os
import secrets
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tunesmith.errors import BadRequestError, PayloadTooLargeError
from tunesmith.manifest import fsync_folder
from tunesmith.store import locks
from tunesmith.store.space import told_as_no_space

MAX_PATH_LENGTH = 4096
MAX_FILENAME_BYTES = 200


def confine(
    path_text: str,
    workspace: Path,
    allowed_roots: Sequence[Path] = (),
    field: str = "path",
) -> Path:
    """The real path that a request means, which need not exist.

    Relative paths start at the workspace. Raises BadRequestError, naming `field`, for what leaves
    the workspace and the allowed roots (by `..`, an absolute path or a link), for names that begin
    with a dot, and for what is neither a file nor a folder.
    """
    _check_text(path_text, field)
    asked = Path(path_text)
    if ".." in asked.parts:
        raise _refusal(field, "has a part `..`; write the path without it")
    roots = [workspace, *allowed_roots]
    real = _real(workspace.absolute() / asked, field)
    home = next((root for root in _real_roots(roots) if real.is_relative_to(root)), None)
    if home is None:
        raise _refusal(field, "leads out of the workspace; use a path inside it")
    inner = [asked.parts] if not asked.is_absolute() else []
    inner.append(real.relative_to(home).parts)
    if any(part.startswith(".") for parts in inner for part in parts):
        raise _refusal(field, "goes through a name that begins with a dot; those are private")
    return _check_kind(real, field)


def _check_text(path_text: str, field: str) -> None:
    if not path_text:
        raise _refusal(field, "is empty; give a path inside the workspace")
    if len(path_text) > MAX_PATH_LENGTH:
        raise _refusal(field, f"is longer than {MAX_PATH_LENGTH} characters")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path_text):
        raise _refusal(field, "holds a control character")


def _real(path: Path, field: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise _refusal(field, f"can't be followed ({_reason(error)})") from None


def _real_roots(roots: Iterable[Path]) -> list[Path]:
    """Longest first, so that a root inside another is the one that counts."""
    real = (Path(os.path.realpath(root)) for root in roots)
    return sorted(real, key=lambda root: len(root.parts), reverse=True)


def _check_kind(real: Path, field: str) -> Path:
    try:
        mode = real.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return real
    except OSError as error:
        raise _refusal(field, f"can't be looked at ({_reason(error)})") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _refusal(field, "is neither a file nor a folder")
    return real


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _refusal(field: str, fault: str) -> BadRequestError:
    return BadRequestError(f"{field}: the path {fault}", param=field)


def safe_name(filename: str) -> str:
    """A client's file name as one harmless part of a path."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    text = unicodedata.normalize("NFC", last.encode("utf-8", "ignore").decode())
    kept = "".join(
        letter for letter in text if unicodedata.category(letter)[0] != "C" or letter == "\u200d"
    )
    kept = kept.strip().lstrip(".").strip()
    stem, dot, suffix = kept.rpartition(".")
    if not dot:
        stem, suffix = kept, ""
    suffix = (dot + suffix)[:20]
    room = MAX_FILENAME_BYTES - len(suffix.encode())
    short = stem.encode()[:room].decode("utf-8", "ignore")
    return (short + suffix) if short else "upload" + suffix


@dataclass(frozen=True)
class Blob:
    sha256: str
    size_bytes: int
    path: Path


class Blobs:
    """The folder in which every uploaded file lies under the digest of its bytes."""

    def __init__(self, folder: Path) -> None:
        """`folder` is `.tunesmith/blobs`; what ended processes left half-written is removed."""
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            with locks.holding(part):
                pass

    def path(self, sha256: str) -> Path:
        assert len(sha256) == 64
        assert sha256.isalnum()
        return self._folder / sha256

    def receive(self, limit_bytes: int) -> "Incoming":
        """Start taking bytes in; use it as a context, and `commit` inside."""
        return Incoming(self, self._folder / f"{secrets.token_hex(8)}.part", limit_bytes)

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)


class Incoming:
    """An upload on its way: a `.part` file that becomes a blob, or is gone."""

    def __init__(self, blobs: Blobs, part: Path, limit_bytes: int) -> None:
        self._blobs, self.part, self._limit_bytes = blobs, part, limit_bytes
        self._digest, self.size_bytes = hashlib.sha256(), 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Incoming":
        with told_as_no_space():
            descriptor = locks.try_hold(self.part)
        assert descriptor is not None, "its name was drawn just now"
        self._file = os.fdopen(descriptor, "wb")
        return self

    def write(self, chunk: bytes) -> None:
        """Raises PayloadTooLargeError over the limit, NoSpaceError where the disk is full."""
        assert self._file is not None
        self.size_bytes += len(chunk)
        if self.size_bytes > self._limit_bytes:
            raise PayloadTooLargeError(
                f"the file is over {self._limit_bytes} bytes, the limit of this server"
            )
        self._digest.update(chunk)
        with told_as_no_space():
            self._file.write(chunk)

    def flush(self) -> None:
        """Make what came so far readable in `part`."""
        assert self._file is not None
        with told_as_no_space():
            self._file.flush()

    def commit(self, sha256: str | None = None) -> Blob:
        """Make it durable under its digest. Raises BadRequestError where `sha256` is another."""
        assert self._file is not None
        digest = self._digest.hexdigest()
        if sha256 is not None and sha256.lower() != digest:
            raise BadRequestError(f"the bytes that came have the SHA-256 {digest}, not {sha256}")
        with told_as_no_space():
            self._file.flush()
            os.fsync(self._file.fileno())
            target = self._blobs.path(digest)
            os.replace(self.part, target)
            fsync_folder(target.parent)
        return Blob(digest, self.size_bytes, target)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):  # the bytes are given up anyway
            self._file.close()
        self.part.unlink(missing_ok=True)

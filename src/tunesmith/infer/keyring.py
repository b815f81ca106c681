"""Who may come in at an engine's door: a key in the clear, or hashes in a file."""

import hashlib
import hmac
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers

from tunesmith.errors import AuthenticationError, BadRequestError, PermissionError
from tunesmith.spec.scopes import SCOPES, Scope

log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
"""Between two looks whether the file has changed: a key that was taken out is refused then."""


@dataclass(frozen=True)
class Holder:
    name: str
    """For counting; never the key."""
    scopes: frozenset[Scope] = frozenset(SCOPES)


class Keyring:
    """One line a key: its SHA-256 in hex, maybe its scopes (`infer,load`), maybe a label.

    `tunesmith keys create --file` writes them.
    """

    def __init__(self, key: str = "", file: Path | None = None) -> None:
        """Raises BadRequestError where the file cannot be read."""
        self._own = {_hash(key): Holder("own")} if key else {}
        self._file = file
        self._holders: Mapping[str, Holder] = {}
        self._stamp = (0, 0)
        self._looked = 0.0
        if file is not None:
            self._holders = read(file)
            self._stamp = _stamp(file)

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._own and self._file is None

    def admit(self, headers: Headers, scope: Scope) -> Holder | None:
        """Who it is; None where no key is wanted. Raises AuthenticationError, PermissionError."""
        if self.is_open:
            return None
        holder = self._find(_presented(headers))
        if holder is None:
            raise AuthenticationError("send a key as Authorization: Bearer <key>, or X-API-Key")
        if scope not in holder.scopes:
            raise PermissionError(f"this key does not open this: it lacks the scope {scope!r}")
        return holder

    def _find(self, presented: str) -> Holder | None:
        self._look()
        told = _hash(presented)
        for known, holder in (*self._own.items(), *self._holders.items()):
            if hmac.compare_digest(known, told):
                return holder
        return None

    def _look(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        try:
            stamp = _stamp(self._file)
            if stamp != self._stamp:
                self._holders, self._stamp = read(self._file), stamp
        except (OSError, BadRequestError) as error:
            log.error("the keys are kept as they were: %s", error)


def read(file: Path) -> dict[str, Holder]:
    """Raises BadRequestError with the line that is wrong."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the file of keys {str(file)!r} cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        scopes = frozenset(words[1].split(",")) if len(words) > 1 else frozenset(SCOPES)
        is_hash = len(words[0]) == 64 and all(each in "0123456789abcdef" for each in words[0])
        if not is_hash or not scopes <= set(SCOPES):
            raise BadRequestError(
                f"{file}:{number}: a line is a key's SHA-256 in hex and, maybe, its scopes of "
                f"{', '.join(SCOPES)}, with commas between"
            )
        found[words[0]] = Holder(words[0][:12], scopes)  # type: ignore[arg-type]
    return found


def _presented(headers: Headers) -> str:
    bearer = headers.get("authorization")
    if bearer is None:
        return headers.get("x-api-key", "").strip()
    kind, _, key = bearer.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size

"""The keys of this server: those made, the test keys until then, the worker's token."""

import hmac
import os
import secrets
import time
from pathlib import Path

from tunesmith.hub.principal import TEST_KEYS, Principal, is_loopback
from tunesmith.manifest import write_durably
from tunesmith.settings import Settings
from tunesmith.spec.scopes import SCOPES
from tunesmith.store import keys as rows
from tunesmith.store.database import Store

CACHE_SECONDS = 3.0
"""So that a stream, whose key is looked at each second, is cut within five."""


class Keys:
    """Looked up in a cache of a few seconds: a revoked key is refused soon after."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._is_loopback = is_loopback(settings.host)
        self._token = worker_token(settings.home)
        self._found: dict[str, tuple[float, Principal | None]] = {}
        self._any: tuple[float, bool] | None = None

    @property
    def is_open(self) -> bool:
        """Whether nobody made a key yet, on a server that only this machine reaches."""
        now = time.monotonic()
        if self._any is None or now - self._any[0] > CACHE_SECONDS:
            self._any = (now, self._store.read(rows.has_any))
        return self._is_loopback and not self._any[1]

    def find(self, key: str, *, is_local: bool) -> Principal | None:
        """Whose key this is; None for a stranger's."""
        if hmac.compare_digest(key.encode("utf-8", "replace"), self._token.encode()):
            return Principal("operator", sees_all=True, is_operator=True)
        if key in TEST_KEYS:
            return self._test_owner(key) if self.is_open and is_local else None
        if len(key) > rows.MAX_KEY_LENGTH:
            return None
        now = time.monotonic()
        seen = self._found.get(key)
        if seen is None or now - seen[0] > CACHE_SECONDS:
            row = self._store.read(lambda tx: rows.find(tx, key))
            principal = None if row is None else _principal(row)
            if len(self._found) > 10_000:
                self._found.clear()
            seen = self._found[key] = (now, principal)
        return seen[1]

    def forget(self) -> None:
        """After a key was made or revoked here."""
        self._found.clear()
        self._any = None

    def _test_owner(self, key: str) -> Principal:
        owner = TEST_KEYS[key]
        return Principal(owner, sees_all=owner == Principal.local().owner)


def _principal(row: rows.Key) -> Principal:
    scopes = frozenset(SCOPES if row.scopes is None else row.scopes)
    return Principal(row.owner, is_worker=row.is_worker, scopes=scopes)


def worker_token(home: Path) -> str:
    """The token that worker and command line share with the API on one machine, made once."""
    place = home / "worker.token"
    if not place.exists():
        own = home / f".worker.token.{secrets.token_hex(8)}"
        write_durably(own, ("sk-worker-" + secrets.token_urlsafe(32)).encode())
        own.chmod(0o600)
        try:
            os.link(own, place)  # of several servers that start at once, the first one's counts
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(own, place)
        own.unlink(missing_ok=True)
    return place.read_text().strip()

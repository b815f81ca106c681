"""Objects in an S3-compatible store: signed addresses, what is there, reading back, clearing away.

Keys, region and endpoint come from the usual AWS_ variables, which the library reads itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from tunesmith.errors import BadRequestError

SIGNED_SECONDS = 3600
_RETRY = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
_CLIENT = {"allow_http": True, "timeout": "60s", "connect_timeout": "5s"}


class ObjectsFailed(Exception):
    """The store did not do what it was asked; the message is its own."""


class Objects:
    """One bucket and prefix. Its calls block; keys are relative to the prefix."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str) -> "Objects":
        """Raises BadRequestError for an address that is no store's."""
        try:
            from obstore.store import S3Store
        except ImportError:
            raise BadRequestError(
                "TUNESMITH_OBJECT_STORE_URL is set, and obstore is not installed: "
                "pip install 'tunesmith[s3]'"
            ) from None
        if not url.startswith("s3://") or len(url) <= len("s3://"):
            raise BadRequestError(
                f"TUNESMITH_OBJECT_STORE_URL: {url[:200]!r} is no s3://bucket/prefix"
            )
        options: Any = {"client_options": _CLIENT, "retry_config": _RETRY}
        return cls(S3Store.from_url(url, **options))

    def sign(self, method: Literal["GET", "PUT"], keys: Sequence[str]) -> list[str]:
        """Addresses that do this one thing for an hour, for whoever knows them."""
        import obstore

        if not keys:
            return []
        with _told():
            signed = obstore.sign(
                self._store, method, list(keys), timedelta(seconds=SIGNED_SECONDS)
            )
        return list(signed)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size by key, of all that lies under a folder."""
        import obstore

        with _told():
            return {
                str(found["path"]): int(found["size"])
                for batch in obstore.list(self._store, prefix)
                for found in batch
            }

    def put(self, key: str, body: bytes) -> None:
        import obstore

        with _told():
            obstore.put(self._store, key, body)

    def read(self, key: str) -> Iterator[bytes]:
        """Its bytes, a block at a time."""
        import obstore

        with _told():
            for block in obstore.get(self._store, key).stream(min_chunk_size=1 << 20):
                yield bytes(block)

    def remove(self, keys: Sequence[str]) -> None:
        """What is not there is no fault."""
        import obstore

        with _told():
            for start in range(0, len(keys), 1000):
                obstore.delete(self._store, list(keys[start : start + 1000]))


@contextmanager
def _told() -> Iterator[None]:
    """Whatever the library raises becomes ObjectsFailed, without the signatures in addresses."""
    try:
        yield
    except Exception as error:
        text = str(error).partition("?X-Amz")[0]
        raise ObjectsFailed(f"{type(error).__name__}: {text[:500]}") from None

"""The one door to the database: a writer that commits for many at once, readers beside it."""

import errno
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tunesmith.errors import NoSpaceError, NotReadyError
from tunesmith.store import migrate, sqlite
from tunesmith.store.sqlite import StoreLocked

__all__ = ["GROUP", "Store", "StoreLocked"]

T = TypeVar("T")
Listener = Callable[[frozenset[str]], None]
GROUP = 256
"""Pieces of work in one commit, at most."""
_SQLITE_FULL = 13
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece(Generic[T]):
    work: Callable[[Connection], T]
    future: "Future[T]"


class _Broken(Exception):
    """The transaction is gone, and with it what the pieces before had done."""


class Store:
    """An open database. `write` changes rows, `read` looks; both take a function of a connection.

    Work may be run again when a commit that it shared fails, so it must change nothing but rows
    (or what it may do twice).
    """

    def __init__(self, writer: Engine, readers: Engine, lock: int | None) -> None:
        self._writer, self._readers, self._lock = writer, readers, lock
        self._queue: queue.SimpleQueue[_Piece[Any] | None] = queue.SimpleQueue()
        self._listeners: list[Listener] = []
        self._gate = threading.Lock()
        self._is_closed = False
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] | None = None) -> "Store":
        """Open, lock and migrate.

        Raises StoreLocked where another process has the SQLite file open, ServerError where the
        schema is newer than this code. `clock` replaces the time of a SQLite database (Unix s).
        """
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            made = create_engine(_with_driver(parsed), pool_pre_ping=True, **_OPTIONS)
            migrate.upgrade(made)
            return cls(made, made, None)
        return cls._open_sqlite(parsed, clock or time.time)

    @classmethod
    def _open_sqlite(cls, url: URL, clock: Callable[[], float]) -> "Store":
        if not url.database or url.database == ":memory:":
            memory = sqlite.engine(
                url.set(database=None), clock=clock, begin="BEGIN", mode="MEMORY", options=_OPTIONS
            )
            migrate.upgrade(memory)
            return cls(memory, memory, None)
        path = Path(url.database).absolute()
        sqlite.prepare_file(path)
        lock = sqlite.lock(path)
        mode = sqlite.journal_mode(sqlite.find_library().sqlite_version_info, path)
        try:
            writer = sqlite.engine(
                url, clock=clock, begin="BEGIN IMMEDIATE", mode=mode, options=_OPTIONS
            )
            migrate.upgrade(writer)
            readers = sqlite.engine(url, clock=clock, begin="BEGIN", mode=mode, options=_OPTIONS)
        except BaseException:
            os.close(lock)
            raise
        return cls(writer, readers, lock)

    def write(self, work: Callable[[Connection], T]) -> "Future[T]":
        """Run `work` on the writer thread; the future resolves once it is committed and synced.

        What `work` raises rolls back only itself. NoSpaceError: the disk is full, nothing changed.
        """
        piece: _Piece[T] = _Piece(work, Future())
        with self._gate:
            if self._is_closed:
                raise NotReadyError("the server is shutting down; try again in a few seconds")
            self._queue.put(piece)
        return piece.future

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on a snapshot, beside the writer and without waiting for it."""
        if self._readers is self._writer and self._writer.dialect.name == "sqlite":
            return self.write(work).result()
        with self._readers.connect() as connection:
            return work(connection)

    def on_commit(self, listener: Listener) -> None:
        """Call `listener` on the writer thread after each commit, with the topics touched."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Finish what is queued, then let go of file and lock."""
        with self._gate:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()
        self._readers.dispose()
        self._writer.dispose()
        if self._lock is not None:
            os.close(self._lock)

    def _run(self) -> None:
        is_open = True
        while is_open:
            group, is_open = self._next_group()
            live = [piece for piece in group if piece.future.set_running_or_notify_cancel()]
            if live:
                self._commit(live)
        if self._connection is not None:
            self._connection.close()

    def _next_group(self) -> tuple[list[_Piece[Any]], bool]:
        """Wait for a piece, then take what else is waiting. False once the queue is closed."""
        group: list[_Piece[Any]] = []
        try:
            while len(group) < GROUP:
                piece = self._queue.get(block=not group)
                if piece is None:
                    return group, False
                group.append(piece)
        except queue.Empty:
            pass
        return group, True

    def _commit(self, group: Sequence[_Piece[Any]]) -> None:
        """Commit a group and answer each piece; where it breaks as a whole, one by one."""
        try:
            answers, topics = self._transact(group)
        except Exception as error:
            self._abandon(error)
            if len(group) == 1 or _is_in_doubt(error):
                for piece in group:
                    piece.future.set_exception(_explain(error.__cause__ or error))
                return
            for piece in group:
                self._commit([piece])
            return
        for piece, (result, failure) in zip(group, answers, strict=True):
            if failure is None:
                piece.future.set_result(result)
            else:
                piece.future.set_exception(_explain(failure))
        self._tell(topics)

    def _transact(
        self, group: Sequence[_Piece[Any]]
    ) -> tuple[list[tuple[Any, Exception | None]], frozenset[str]]:
        if self._connection is None:
            self._connection = self._writer.connect()
        connection = self._connection
        topics: set[str] = set()
        with connection.begin():
            answers = [_run_piece(connection, piece, topics) for piece in group]
        return answers, frozenset(topics)

    def _abandon(self, error: Exception) -> None:
        """Drop a connection whose transaction failed: the next one starts clean."""
        _log.warning("a transaction failed as a whole: %s", error)
        if self._connection is None:
            return
        try:
            if self._writer.pool.__class__.__name__ != "StaticPool":
                self._connection.invalidate()
            self._connection.close()
        except SQLAlchemyError:
            _log.warning("a broken connection could not be closed", exc_info=True)
        self._connection = None

    def _tell(self, topics: frozenset[str]) -> None:
        if not topics:
            return
        for listener in self._listeners:
            try:
                listener(topics)
            except Exception:
                _log.exception("a listener of commits failed")


def _run_piece(
    connection: Connection, piece: _Piece[Any], topics: set[str]
) -> tuple[Any, Exception | None]:
    cursor = connection.connection.cursor()
    connection.info["topics"] = set()
    cursor.execute("SAVEPOINT piece")
    try:
        result = piece.work(connection)
        cursor.execute("RELEASE SAVEPOINT piece")
    except Exception as error:
        try:
            cursor.execute("ROLLBACK TO SAVEPOINT piece")
            cursor.execute("RELEASE SAVEPOINT piece")
        except Exception:
            raise _Broken(str(error)) from error
        return None, error
    finally:
        cursor.close()
    topics |= connection.info["topics"]
    return result, None


def _is_in_doubt(error: Exception) -> bool:
    """Whether the connection was lost, so that the commit may or may not have happened."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def _explain(error: BaseException) -> BaseException:
    """The same error, or one of ours where the disk is full or the database can't be reached."""
    cause: Any = error.orig if isinstance(error, DBAPIError) else error
    is_full = getattr(cause, "sqlite_errorcode", None) == _SQLITE_FULL or (
        isinstance(error, DBAPIError)
        and ("disk is full" in str(cause) or "No space left" in str(cause))
    )
    if is_full or (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)):
        return NoSpaceError("the disk that holds the workspace is full; free space and try again")
    if isinstance(error, DBAPIError) and (
        error.connection_invalidated or type(cause).__name__ == "OperationalError"
    ):
        _log.error("the database failed: %s", cause)
        return NotReadyError("the database can't be reached; try again in a few seconds")
    return error


def _with_driver(url: URL) -> URL:
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_OPTIONS: dict[str, Any] = {
    "json_serializer": _encode,
    "json_deserializer": msgspec.json.decode,
    "hide_parameters": True,
}

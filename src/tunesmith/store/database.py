"""The one door to the database: a writer that commits for many at once, readers beside it."""

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from sqlalchemy import Engine, make_url
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tunesmith.errors import NoSpaceError, NotReadyError, ServerError
from tunesmith.store import migrate, sqlite
from tunesmith.store.clock import SteadyClock
from tunesmith.store.group import LocalWriter, Piece, Writer
from tunesmith.store.sqlite import StoreLocked

__all__ = ["GROUP", "Store", "StoreLocked"]

T = TypeVar("T")


class Ear(Protocol):
    """What hears of other processes' commits."""

    def close(self) -> None: ...


Listener = Callable[[frozenset[str]], None]
GROUP = 256
"""Pieces of work in one commit, at most."""
_SQLITE_FULL = 13
_log = logging.getLogger(__name__)


class Store:
    """An open database. `write` changes rows, `read` looks; both take a function of a connection.

    Work may be run again when a commit that it shared fails, so it must change nothing but rows
    (or what it may do twice).
    """

    def __init__(
        self, engine: Engine, readers: Engine, lock: int | None = None, writer: Writer | None = None
    ) -> None:
        self._engine, self._readers, self._lock = engine, readers, lock
        self._writer: Writer = writer or LocalWriter(engine)
        self._queue: queue.SimpleQueue[Piece[Any] | None] = queue.SimpleQueue()
        self._listeners: list[Listener] = []
        self._ear: Ear | None = None
        self._gate = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def is_alone(self) -> bool:
        """Whether no other process can have this database open."""
        return self._engine.dialect.name == "sqlite"

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] | None = None) -> "Store":
        """Open, lock and migrate.

        Raises StoreLocked where another process has the SQLite file open, ServerError where the
        schema is newer than this code or the database can't be used. `clock` replaces the
        database's own (Unix seconds).
        """
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return cls._open_sqlite(parsed, clock or SteadyClock())
        if parsed.get_backend_name() == "postgresql":
            return cls._open_postgres(parsed, clock)
        raise ServerError(
            f"the database {parsed.drivername} is not known; give the URL of a SQLite file "
            "(sqlite:///…) or of PostgreSQL (postgresql://…)"
        )

    @classmethod
    def _open_postgres(cls, url: URL, clock: Callable[[], float] | None) -> "Store":
        from tunesmith.store import commits, listen, postgres  # not needed beside SQLite

        engine = postgres.open_engine(url, clock=clock, options=_OPTIONS)
        writer = commits.PostgresWriter(engine)
        store = cls(engine, engine, None, writer)
        store._ear = listen.Listener(engine, writer.id, store._tell)
        return store

    @classmethod
    def _open_sqlite(cls, url: URL, clock: Callable[[], float]) -> "Store":
        if not url.database or url.database == ":memory:":
            memory = sqlite.engine(
                url.set(database=None), clock=clock, begin="BEGIN", mode="MEMORY", options=_OPTIONS
            )
            migrate.upgrade(memory)
            return cls(memory, memory)
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
        piece: Piece[T] = Piece(work, Future())
        with self._gate:
            if self._is_closed:
                raise NotReadyError("the server is shutting down; try again in a few seconds")
            self._queue.put(piece)
        return piece.future

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` beside the writer and without waiting for it.

        SQLite shows it one snapshot; on PostgreSQL each statement sees what is committed then.
        Raises NotReadyError where the database can't be reached.
        """
        if not self.is_alone:
            return self._read_far(work)
        if self._readers is self._engine:
            return self.write(work).result()
        with self._readers.connect() as connection:
            return work(connection)

    def _read_far(self, work: Callable[[Connection], T]) -> T:
        """Once more where the connection was lost: all that lay idle are lost with it."""
        for is_last in (False, True):
            try:
                with self._readers.connect() as connection:
                    return work(connection)
            except (DBAPIError, PoolTimeoutError) as error:
                explained = _explain(error)
                if is_last or not isinstance(explained, NotReadyError):
                    raise explained from error
        raise AssertionError

    def on_commit(self, listener: Listener) -> None:
        """Call `listener` with the topics touched after each commit, here or in another process.

        It is called on a thread of the store's, and must not wait.
        """
        self._listeners.append(listener)

    def close(self) -> None:
        """Finish what is queued, then let go of file and lock."""
        with self._gate:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        if self._ear is not None:
            self._ear.close()
        self._thread.join()
        self._readers.dispose()
        self._engine.dispose()
        if self._lock is not None:
            os.close(self._lock)

    def _run(self) -> None:
        is_open = True
        while is_open:
            group, is_open = self._next_group()
            live = [piece for piece in group if piece.future.set_running_or_notify_cancel()]
            if live:
                self._commit(live)
        self._writer.close()

    def _next_group(self) -> tuple[list[Piece[Any]], bool]:
        """Wait for a piece, then take what else is waiting. False once the queue is closed."""
        group: list[Piece[Any]] = []
        try:
            while len(group) < GROUP:
                piece = self._queue.get(block=not group)
                if piece is None:
                    return group, False
                group.append(piece)
        except queue.Empty:
            pass
        return group, True

    def _commit(self, group: Sequence[Piece[Any]]) -> None:
        """Commit a group and answer each piece; where it breaks as a whole, one by one."""
        try:
            answers = self._writer.run(group)
        except Exception as error:
            _log.warning("a transaction failed as a whole: %s", error)
            if len(group) == 1 or isinstance(error, NotReadyError):
                for piece in group:
                    piece.future.set_exception(_explain(error.__cause__ or error))
                return
            for piece in group:
                self._commit([piece])
            return
        for piece, (result, failure) in zip(group, answers.said, strict=True):
            if failure is None:
                piece.future.set_result(result)
            else:
                piece.future.set_exception(_explain(failure))
        self._tell(answers.topics)

    def _tell(self, topics: frozenset[str]) -> None:
        if not topics:
            return
        for listener in self._listeners:
            try:
                listener(topics)
            except Exception:
                _log.exception("a listener of commits failed")


def _explain(error: BaseException) -> BaseException:
    """The same error, or one of ours where the disk is full or the database can't be reached."""
    cause: Any = error.orig if isinstance(error, DBAPIError) else error
    is_full = getattr(cause, "sqlite_errorcode", None) == _SQLITE_FULL or (
        isinstance(error, DBAPIError)
        and ("disk is full" in str(cause) or "No space left" in str(cause))
    )
    if is_full or (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)):
        return NoSpaceError("the disk that holds the workspace is full; free space and try again")
    if isinstance(error, PoolTimeoutError) or (
        isinstance(error, DBAPIError)
        and (error.connection_invalidated or isinstance(error, OperationalError))
    ):
        _log.error("the database failed: %s", cause)
        return NotReadyError("the database can't be reached; try again in a few seconds")
    return error


def _encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_OPTIONS: dict[str, Any] = {
    "json_serializer": _encode,
    "json_deserializer": msgspec.json.decode,
    "hide_parameters": True,
}

"""Pieces of work that share one commit, and how SQLite runs them."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece(Generic[T]):
    work: Callable[[Connection], T]
    future: "Future[T]"


@dataclass
class Answers:
    """What became of each piece of a committed group: its result, or what it raised."""

    said: list[tuple[Any, Exception | None]]
    topics: frozenset[str]


class Broken(Exception):
    """The transaction is gone, and with it what the pieces before had done."""


class Writer(Protocol):
    """The connection that changes rows."""

    def run(self, group: Sequence[Piece[Any]]) -> Answers:
        """Commit a group. Raises where it failed as a whole: then nothing of it was done."""
        ...

    def close(self) -> None: ...


class LocalWriter:
    """SQLite's: a commit has happened when it returns, and it can't get lost on the way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def run(self, group: Sequence[Piece[Any]]) -> Answers:
        if self._connection is None:
            self._connection = self._engine.connect()
        connection, topics = self._connection, set[str]()
        try:
            with connection.begin():
                said = [_run_piece(connection, piece, topics) for piece in group]
        except Exception:
            self._drop(connection)
            raise
        return Answers(said, frozenset(topics))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _drop(self, connection: Connection) -> None:
        """The next transaction starts on a clean connection."""
        self._connection = None
        try:
            if not isinstance(self._engine.pool, StaticPool):
                connection.invalidate()
            connection.close()
        except SQLAlchemyError:
            _log.warning("a broken connection could not be closed", exc_info=True)


def _run_piece(
    connection: Connection, piece: Piece[Any], topics: set[str]
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
            raise Broken(str(error)) from error
        return None, error
    finally:
        cursor.close()
    topics |= connection.info["topics"]
    return result, None

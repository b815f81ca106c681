"""Group commit on PostgreSQL: retried where others were in the way, and never a guess.

Each writer has a row of its own, which every group of its that changes something numbers in the
same transaction. Where the connection breaks during a commit, that row tells whether it happened:
reading it with a lock waits for whatever the lost connection is still doing. (A transaction's id
would not do: after a crash the server may hand it out again.)
"""

import json
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg.sql import quote
from sqlalchemy import Engine, bindparam, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.errors import NotReadyError
from tunesmith.store.group import Answers, Broken, Piece
from tunesmith.store.postgres import is_busy, is_lost, is_outrun
from tunesmith.store.tables import ALL, commits, now

CHANNEL = "tunesmith"
PATIENCE_SECONDS = 10.0
"""For a server that went away to come back, before work is refused."""
MAX_PAYLOAD_BYTES = 7900
"""PostgreSQL takes 7999."""
BUSY_TRIES = 3
OUTRUN_TRIES = 3
_log = logging.getLogger(__name__)


class _Again(Exception):
    """Nothing of the group was done; it can be run again. Its cause says why."""


class _InDoubt(Exception):
    """The connection broke during the commit."""


class PostgresWriter:
    """Used by one thread."""

    def __init__(self, engine: Engine, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.id = secrets.token_hex(8)
        self._engine, self._patience = engine, patience_seconds
        self._connection: Connection | None = None
        self._number = 0
        self._away_since: float | None = None

    def run(self, group: Sequence[Piece[Any]]) -> Answers:
        """Raises NotReadyError where the server stays away for longer than the patience."""
        tries = 0
        while True:
            try:
                answers = self._try(group)
            except _Again as again:
                tries += not self._is_away(again.__cause__)
                if tries >= BUSY_TRIES:
                    raise again.__cause__ or again from None
            else:
                self._away_since = None
                return answers
            time.sleep(0.05 * secrets.randbelow(4))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _is_away(self, error: BaseException | None) -> bool:
        """Whether it is the server that is away. Raises NotReadyError once that lasts too long."""
        if error is None or not is_lost(error):
            return False
        self._drop()
        now = time.monotonic()
        if self._away_since is None:
            _log.warning("the database went away: %s", error)
            self._away_since = now
        if now - self._away_since > self._patience:
            raise _away(error)
        time.sleep(0.1)
        return True

    def _try(self, group: Sequence[Piece[Any]]) -> Answers:
        """Raises _Again, or what made the group fail as a whole."""
        try:
            connection, driver = self._connected()
            answers = self._run_pieces(connection, driver, group)
        except Exception as error:
            self._roll_back()
            if is_lost(error) or is_busy(error) or isinstance(error, Broken):
                raise _Again from (error.__cause__ if isinstance(error, Broken) else error)
            raise
        try:
            self._commit(driver, len(group), answers.topics)
        except _InDoubt as doubt:
            if not self._is_committed(doubt):
                raise _Again from doubt.__cause__
        return answers

    def _connected(self) -> "tuple[Connection, psycopg.Connection[Any]]":
        if self._connection is None:
            self._connection = self._engine.connect()
            self._connection.execute(_OWN_ROW, {"writer": self.id, "number": self._number})
        driver: Any = self._connection.connection.driver_connection
        return self._connection, driver

    def _run_pieces(
        self, connection: Connection, driver: "psycopg.Connection[Any]", group: Sequence[Piece[Any]]
    ) -> Answers:
        """A piece alone needs no savepoint: what it raises takes the whole transaction back."""
        is_alone = len(group) == 1
        _send(driver, "BEGIN" if is_alone else "BEGIN; SAVEPOINT piece")
        said, topics = [], set[str]()
        for number, piece in enumerate(group):
            if number:
                _send(driver, "RELEASE SAVEPOINT piece; SAVEPOINT piece")
            undo = "ROLLBACK; BEGIN" if is_alone else "ROLLBACK TO SAVEPOINT piece"
            result, failure = _run_piece(connection, driver, piece, undo)
            said.append((result, failure))
            if failure is None:
                topics |= connection.info["topics"]
        return Answers(said, frozenset(topics))

    def _commit(
        self, driver: "psycopg.Connection[Any]", count: int, topics: frozenset[str]
    ) -> None:
        """All that is left to say, in one go. Raises _InDoubt, _Again."""
        self._number += 1
        words = [_NUMBER_IT.format(number=self._number, writer=self.id)]
        if count > 1:
            words.insert(0, "RELEASE SAVEPOINT piece")
        for payload in payloads(self.id, topics):
            words.append(f"SELECT pg_notify('{CHANNEL}', {quote(payload, driver)})")
        try:
            _send(driver, "; ".join([*words, "COMMIT"]))
        except psycopg.Error as error:
            if driver.closed:
                raise _InDoubt from error
            self._roll_back()
            if is_busy(error):
                raise _Again from error
            raise

    def _is_committed(self, doubt: _InDoubt) -> bool:
        """Ask until there is an answer. Raises NotReadyError where there is none."""
        lost = doubt.__cause__
        _log.warning("the connection broke during a commit; asking whether it happened: %s", lost)
        while self._is_away(lost):
            try:
                with self._engine.connect() as connection:
                    number = connection.scalar(_LAST, {"writer": self.id})
            except SQLAlchemyError as error:
                if not (is_lost(error) or is_busy(error)):
                    raise
                continue
            if number is None:  # somebody took the row away: nobody can tell any more
                raise _away(lost or doubt)
            _log.warning("the commit %s", "happened" if number == self._number else "did not")
            return bool(number == self._number)
        raise AssertionError("a commit is in doubt only where its connection is lost")

    def _roll_back(self) -> None:
        if self._connection is None:
            return
        try:
            driver: Any = self._connection.connection.driver_connection
            _send(driver, "ROLLBACK")
        except (SQLAlchemyError, psycopg.Error):
            self._drop()

    def _drop(self) -> None:
        """The next transaction starts on a connection of its own."""
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                connection.invalidate()
                connection.close()
        except SQLAlchemyError:
            _log.warning("a broken connection could not be closed", exc_info=True)


def _send(driver: "psycopg.Connection[Any]", words: str) -> None:
    """Statements without parameters, in one round trip."""
    driver.execute(words, prepare=False)


def _run_piece(
    connection: Connection, driver: "psycopg.Connection[Any]", piece: Piece[Any], undo: str
) -> tuple[Any, Exception | None]:
    """Its result, or what it raised, with its changes taken back. Raises Broken, and what says
    that the whole group should be run again."""
    for is_last in [False] * OUTRUN_TRIES + [True]:
        connection.info["topics"] = set()
        try:
            return piece.work(connection), None
        except Exception as error:
            if is_lost(error) or is_busy(error):
                raise
            try:
                _send(driver, undo)
            except psycopg.Error:
                raise Broken(str(error)) from error
            if is_last or not is_outrun(error):
                return None, error
    raise AssertionError


def payloads(sender: str, topics: Iterable[str]) -> Iterator[str]:
    """What NOTIFY carries: JSON lists, the sender first, each short enough."""
    waiting = sorted(topics)
    while waiting:
        chunk, size = [sender], len(sender) + 4
        while waiting and size < MAX_PAYLOAD_BYTES:
            size += len(json.dumps(waiting[-1])) + 2
            if size <= MAX_PAYLOAD_BYTES:
                chunk.append(waiting.pop())
            elif len(chunk) == 1:
                waiting[-1] = ALL
                size = len(sender) + 4
        yield json.dumps(chunk)


def _away(error: BaseException) -> NotReadyError:
    _log.error("the database can't be reached: %s", error)
    away = NotReadyError("the database can't be reached; try again in a few seconds")
    away.retry_after = 2
    return away


_OWN_ROW = postgresql.insert(commits).values(at=now()).on_conflict_do_nothing()
_NUMBER_IT = (
    "UPDATE commits SET number = {number}, at = extract(epoch from clock_timestamp()) "
    "WHERE writer = '{writer}' AND pg_current_xact_id_if_assigned() IS NOT NULL"
)
_LAST = select(commits.c.number).where(commits.c.writer == bindparam("writer")).with_for_update()

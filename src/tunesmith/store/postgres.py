"""How a PostgreSQL database is opened: bounds on every wait, and what it must be able to do."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tunesmith.errors import ServerError
from tunesmith.store import migrate
from tunesmith.store.tables import POSTGRES_CLOCK

OLDEST = 13
"""The oldest major version: the first with pg_current_xact_id_if_assigned()."""
MIGRATION_SECONDS = 300.0
"""For another process to bring the schema up to date."""
_MIGRATION_LOCK = 0x74756E65
_CONNECT = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "tunesmith",
    "client_encoding": "utf8",
}
"""What libpq is told, unless the URL says otherwise; a dead host is noticed within about 10 s."""
_SESSION = {
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "15s",
    "statement_timeout": "30s",
}
"""A process that is frozen inside a transaction loses it before those who wait for its rows give
up. `options=-c …` in the URL comes after these, and wins."""
_UNBOUNDED = dict.fromkeys(_SESSION, "0")
_LOST = ("08", "57P01", "57P02", "57P03", "57P05", "25P03", "25006", "53300")
_BUSY = ("40001", "40P01")
_log = logging.getLogger(__name__)


def open_engine(
    url: URL, *, clock: Callable[[], float] | None = None, options: dict[str, Any]
) -> Engine:
    """An engine whose connections commit each statement by themselves, its schema up to date.

    Raises ServerError where the server is too old or its database can't hold every text. `clock`
    stands in for the server's time (Unix seconds), for tests.
    """
    _prepare(url)
    made = create_engine(
        with_driver(url),
        isolation_level="AUTOCOMMIT",
        connect_args=_arguments(url, _SESSION),
        pool_size=8,
        max_overflow=24,
        pool_timeout=10,
        **options,
    )
    if clock is not None:
        _set_clock(made, clock)
    return made


def _prepare(url: URL) -> None:
    """A migration is one transaction, however long it takes."""
    patient = create_engine(
        with_driver(url), connect_args=_arguments(url, _UNBOUNDED), poolclass=NullPool
    )
    try:
        with patient.connect() as connection:
            _look_over(connection)
        with _sole_migration(patient):
            migrate.upgrade(patient)
    except DBAPIError as error:
        raise ServerError(f"the database can't be opened: {error.orig}") from None


def with_driver(url: URL) -> URL:
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _arguments(url: URL, session: dict[str, str]) -> dict[str, Any]:
    own = {name: value for name, value in _CONNECT.items() if name not in url.query}
    asked = url.query.get("options", "")
    parts = [f"-c {name}={value}" for name, value in session.items()]
    parts += [asked] if isinstance(asked, str) else asked
    return {**own, "options": " ".join(parts).strip()}


def _set_clock(engine: Engine, clock: Callable[[], float]) -> None:
    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def tell_time(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        return statement.replace(POSTGRES_CLOCK, f"{clock()!r}::double precision"), parameters


def _look_over(connection: Connection) -> None:
    names = ("server_version_num", "server_encoding", "synchronous_commit", "fsync")
    asked = ", ".join(f"current_setting('{name}')" for name in names)
    version, encoding, synchronous, fsync = connection.execute(text(f"select {asked}")).one()
    if int(version) // 10_000 < OLDEST:
        raise ServerError(
            f"this PostgreSQL is version {int(version) // 10_000}; {OLDEST} is the oldest that "
            "Tunesmith works with"
        )
    if encoding != "UTF8":
        raise ServerError(
            f"the database has the encoding {encoding}; make one with UTF8: "
            "create database tunesmith encoding 'UTF8' template template0"
        )
    if synchronous == "off" or fsync == "off":
        _log.warning(
            "PostgreSQL runs with synchronous_commit=%s and fsync=%s: what was acknowledged can be "
            "lost when its host fails",
            synchronous,
            fsync,
        )


@contextlib.contextmanager
def _sole_migration(engine: Engine) -> Iterator[None]:
    """Several processes may start at once: one of them migrates, the others wait for it."""
    deadline = time.monotonic() + MIGRATION_SECONDS
    with engine.connect() as connection:
        while not connection.scalar(text(f"select pg_try_advisory_lock({_MIGRATION_LOCK})")):
            if time.monotonic() > deadline:
                raise ServerError("another process has been migrating the database for too long")
            time.sleep(0.1)
        try:
            yield
        finally:
            connection.scalar(text(f"select pg_advisory_unlock({_MIGRATION_LOCK})"))


def is_lost(error: BaseException) -> bool:
    """Whether the connection, or the server behind it, went away."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    code = _sqlstate(error)
    if code is None:  # what libpq itself says has no code
        return isinstance(_origin(error), psycopg.OperationalError)
    return code.startswith(_LOST)


def is_busy(error: BaseException) -> bool:
    """Whether other transactions were in the way: the same, done again, may well succeed."""
    return _sqlstate(error) in _BUSY


def is_outrun(error: BaseException) -> bool:
    """Whether another process may have just written a row with this key, or removed the row that
    this one points to."""
    return _sqlstate(error) in ("23505", "23503")


def _origin(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error


def _sqlstate(error: BaseException) -> str | None:
    found: str | None = getattr(_origin(error), "sqlstate", None)
    return found

"""A copy of the database as it was at one moment, made while others write to it, and the way back.

SQLite makes it itself (VACUUM INTO, in one read transaction). On PostgreSQL it is pg_dump's work,
in the very snapshot that the rows are then read in.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine, inspect, make_url, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import NullPool

from tunesmith.errors import BadRequestError, ConflictError, NotFoundError, ServerError
from tunesmith.store import migrate, sqlite
from tunesmith.store.postgres import with_driver
from tunesmith.store.space import told_as_no_space

NAMES = {"sqlite": "database.sqlite", "postgresql": "database.dump"}
"""Of the copy, by the database's kind."""
_MAX_COMPLAINT = 2000


def kind_of(url: str) -> str:
    return make_url(url).get_backend_name()


@contextmanager
def snapshot(url: str, folder: Path) -> Iterator[Connection]:
    """Write the copy into `folder`, and open a connection that sees just what is in it.

    Raises NotFoundError where there is no database, BadRequestError, NoSpaceError, ServerError.
    """
    parsed = make_url(url)
    into = folder / NAMES[parsed.get_backend_name()]
    into.unlink(missing_ok=True)
    if parsed.get_backend_name() == "sqlite":
        _copy_sqlite(parsed, into)
        seen = _engine(parsed.set(database=str(into)))
    else:
        seen = _engine(with_driver(parsed))
    try:
        with seen.connect() as connection:
            if migrate.current(connection) is None:
                raise NotFoundError(f"the database {parsed!r} holds nothing of Tunesmith")
            if parsed.get_backend_name() != "sqlite":
                _dump_postgres(parsed, connection, into)
            yield connection
    finally:
        seen.dispose()


def load(source: Path, kind: str, url: str) -> None:
    """Put a copy where `url` says. Raises ConflictError where something is there already."""
    parsed = make_url(url)
    if parsed.get_backend_name() != kind:
        raise BadRequestError(
            f"the backup holds a {kind} database and TUNESMITH_DATABASE_URL names "
            f"{parsed.get_backend_name()}; a restore does not change the kind"
        )
    if kind == "sqlite":
        place = Path(parsed.database or "")
        if place.exists():
            raise ConflictError(f"{place} exists; a restore overwrites nothing")
        sqlite.prepare_file(place)
        with told_as_no_space():
            shutil.copyfile(source / NAMES[kind], place)
        return
    _refuse_filled(parsed)
    options = ["--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"]
    _run("pg_restore", parsed, [*options, str(source / NAMES[kind])])


def _copy_sqlite(url: URL, into: Path) -> None:
    place = Path(url.database or "")
    if not place.is_file():
        raise NotFoundError(f"there is no database at {place}")
    library = sqlite.find_library()
    address = f"file:{_quoted(place.absolute())}?mode=ro"
    connection = library.connect(address, uri=True, timeout=sqlite.BUSY_MS / 1000)
    try:
        connection.execute("VACUUM INTO ?", (str(into),))
    except library.Error as error:
        into.unlink(missing_ok=True)
        raise ServerError(f"{place} can't be copied: {error}") from None
    finally:
        connection.close()
    into.chmod(0o600)


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _dump_postgres(url: URL, connection: Connection, into: Path) -> None:
    """The connection has a transaction open, whose snapshot is shared with pg_dump."""
    name = connection.scalar(text("select pg_export_snapshot()"))
    into.touch(mode=0o600)
    _run("pg_dump", url, ["--format=custom", f"--snapshot={name}", f"--file={into}"])


def _run(program: str, url: URL, arguments: list[str]) -> None:
    """The password goes by the environment: a command line is for all to read."""
    found = shutil.which(program)
    if found is None:
        raise BadRequestError(
            f"{program} is not installed here, and PostgreSQL is copied with it: install "
            "PostgreSQL's client programs, of the server's version or newer"
        )
    address = url.set(drivername="postgresql", password=None)
    secret = {"PGPASSWORD": str(url.password)} if url.password is not None else {}
    done = subprocess.run(
        [found, f"--dbname={address.render_as_string()}", *arguments],
        env=os.environ | secret,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-_MAX_COMPLAINT:]
        raise ServerError(f"{program} ended with status {done.returncode}: {said}")


def _refuse_filled(url: URL) -> None:
    engine = _engine(with_driver(url))
    try:
        with engine.connect() as connection:
            tables = inspect(connection).get_table_names()
    finally:
        engine.dispose()
    if tables:
        raise ConflictError(
            f"the database {url.database!r} is not empty (it has a table {tables[0]!r}); a restore "
            "overwrites nothing: make a new one and name it in TUNESMITH_DATABASE_URL"
        )


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        return create_engine(url, module=sqlite.find_library(), poolclass=NullPool)
    return create_engine(url, poolclass=NullPool, isolation_level="REPEATABLE READ")

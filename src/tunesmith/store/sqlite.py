"""How a SQLite file is opened so that what was acknowledged stays: the library, the lock, WAL."""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import QueuePool, StaticPool

from tunesmith.errors import ConflictError
from tunesmith.store.tables import CLOCK

BUSY_MS = 10_000
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "ceph", "lustre", "glusterfs", "afs")
_log = logging.getLogger(__name__)


class StoreLocked(ConflictError):
    """Another process has the SQLite file open."""


def is_wal_safe(version: tuple[int, ...]) -> bool:
    """Whether a SQLite library carries the WAL-reset fix: 3.51.3, back-ported to 3.50.7, 3.44.6."""
    return (
        version >= (3, 51, 3)
        or ((3, 50, 7) <= version < (3, 51))
        or ((3, 44, 6) <= version < (3, 45))
    )


def find_library() -> ModuleType:
    """The interpreter's SQLite where it is safe, else pysqlite3 where that is newer."""
    if is_wal_safe(sqlite3.sqlite_version_info):
        return sqlite3
    try:
        from pysqlite3 import dbapi2
    except ImportError:
        return sqlite3
    return dbapi2 if dbapi2.sqlite_version_info > sqlite3.sqlite_version_info else sqlite3


def journal_mode(version: tuple[int, ...], database: Path) -> str:
    """WAL, or TRUNCATE where the library or the file system can't be trusted with WAL."""
    if not is_wal_safe(version):
        text = ".".join(map(str, version))
        _log.warning(
            "SQLite %s can corrupt a database in WAL mode; using journal_mode=TRUNCATE, which is "
            "slower. Install pysqlite3, or a Python with SQLite 3.51.3 or newer.",
            text,
        )
        return "TRUNCATE"
    kind = file_system(database.parent)
    if kind.startswith(_NETWORK):
        _log.warning("%s lies on %s, which can't share memory: no WAL", database, kind)
        return "TRUNCATE"
    return "WAL"


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`; empty where it can't be told."""
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    best, found = "", ""
    for line in lines:
        mount, kind = line.split()[1:3]
        mount = mount.replace("\\040", " ")
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, found = mount, kind
    return found


def lock(database: Path) -> int:
    """Take the lock file for as long as the descriptor returned is open. Raises StoreLocked."""
    path = database.with_name(database.name + ".lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreLocked(
            f"{database} is open in another process, and SQLite serves one. Stop that one, or use "
            "PostgreSQL for several: TUNESMITH_DATABASE_URL=postgresql+psycopg://…"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def prepare_file(database: Path) -> None:
    """Make the folder (0700) and the file (0600)."""
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def engine(
    url: URL, *, clock: Callable[[], float], begin: str, mode: str, options: dict[str, Any]
) -> Engine:
    """An engine whose transactions start with `begin` and whose clock is `clock`."""
    made = create_engine(
        url,
        module=find_library(),
        connect_args={"check_same_thread": False, "timeout": BUSY_MS / 1000},
        **(
            {"poolclass": QueuePool, "pool_size": 8, "max_overflow": 24}
            if url.database
            else {"poolclass": StaticPool}
        ),
        **options,
    )

    @event.listens_for(made, "connect")
    def set_up(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.create_function(CLOCK, 0, clock)
        for pragma in (
            f"busy_timeout = {BUSY_MS}",
            f"journal_mode = {mode}",
            "synchronous = FULL",
            "foreign_keys = ON",
            "trusted_schema = OFF",
            "journal_size_limit = 67108864",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(made, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return made

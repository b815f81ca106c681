"""A schema is old or new, never between: a migration killed at each of its statements."""

import os
import signal
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.pool import NullPool

from tunesmith.store import migrate, sqlite
from tunesmith.store.database import Store

LOOKS = ("SELECT", "PRAGMA", "SHOW", "ROLLBACK")


def open_engine(url: str) -> Engine:
    """As plain as can be: what is migrated here is opened by the store later."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, poolclass=NullPool)
    sqlite.prepare_file(Path(parsed.database or ""))
    mode = sqlite.journal_mode(sqlite.find_library().sqlite_version_info, Path("/"))
    return sqlite.engine(parsed, clock=lambda: 0.0, begin="BEGIN IMMEDIATE", mode=mode, options={})


def killed_at(url: str, statement: int, target: str) -> bool:
    """Migrate in a child that is killed before its n-th change. Whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            _migrate(url, statement, target)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _migrate(url: str, statement: int, target: str) -> None:
    engine = open_engine(url)
    left = statement

    @event.listens_for(engine, "before_cursor_execute")
    def count(connection, cursor, said, *rest):  # type: ignore[no-untyped-def]
        nonlocal left
        if said.strip().upper().startswith(LOOKS):
            return
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    migrate.upgrade(engine, target)
    os._exit(0)


def tables_of(url: str) -> tuple[str | None, frozenset[str]]:
    """The schema's number and its tables."""
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            found = frozenset(inspect(connection).get_table_names())
            return migrate.current(connection), found - {"alembic_version"}
    finally:
        engine.dispose()


@pytest.fixture
def empty_url(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/.tunesmith/db.sqlite"
    return str(request.getfixturevalue("postgres").database())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize("number", migrate.known())
def test_a_migration_killed_at_any_statement_leaves_the_old_schema_whole(
    empty_url: str, number: str
) -> None:
    before = [known for known in migrate.known() if known < number]
    if before:
        engine = open_engine(empty_url)
        migrate.upgrade(engine, before[-1])
        with engine.begin() as connection:
            connection.execute(text("insert into secrets values ('표시', :value)"), {"value": b"1"})
        engine.dispose()
    old = tables_of(empty_url)
    kills = 0
    while killed_at(empty_url, kills, number):
        assert tables_of(empty_url) == old
        kills += 1
    assert kills > 1
    new = tables_of(empty_url)
    assert new[0] == number
    assert new != old
    store = Store.open(empty_url)
    try:
        assert store.read(migrate.current) == migrate.known()[-1]
        marks = store.read(lambda tx: tx.scalar(text("select count(*) from secrets")))
        assert marks == len(before[-1:])
    finally:
        store.close()

"""What was acknowledged stays; what failed leaves no trace; one process has the file."""

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, insert, inspect, select, text
from sqlalchemy.engine import Connection

from store_fixtures import Ledger, settle
from tunesmith.errors import NoSpaceError, NotReadyError, ServerError
from tunesmith.store import audit, migrate, sqlite, tables
from tunesmith.store.database import Store, StoreLocked


def note(name: str) -> Callable[[Connection], None]:
    return lambda tx: audit.append(tx, name, "test", "x")


def told_by(store: Store) -> list[frozenset[str]]:
    """What its listeners are told from now on, but for what wakes everyone: a new connection."""
    told: list[frozenset[str]] = []
    store.on_commit(lambda topics: None if tables.ALL in topics else told.append(topics))
    return told


def actors(store: Store) -> list[str]:
    return [line.actor for line in store.read(lambda tx: audit.lines(tx, 10_000))]


def test_a_piece_that_raises_takes_only_itself_back(ledger: Ledger) -> None:
    def fail(tx: Connection) -> None:
        audit.append(tx, "bad", "test", "x")
        raise ValueError("no")

    gate = threading.Event()
    ledger.store.write(lambda tx: gate.wait(10))
    futures = [
        ledger.store.write(note("하나")),
        ledger.store.write(fail),
        ledger.store.write(note("둘")),
    ]
    gate.set()
    settle(futures)
    assert isinstance(futures[1].exception(), ValueError)
    assert actors(ledger.store) == ["둘", "하나"]


def test_many_pieces_share_one_commit(ledger: Ledger) -> None:
    commits = told_by(ledger.store)
    begun, gate = threading.Event(), threading.Event()

    def hold(tx: Connection) -> None:
        begun.set()
        gate.wait(60)

    ledger.store.write(hold)
    assert begun.wait(60)

    def touch(number: int) -> Callable[[Connection], None]:
        return lambda tx: tables.touch(tx, f"t{number}")

    futures = [ledger.store.write(touch(number)) for number in range(50)]
    gate.set()
    settle(futures)
    ledger.write(lambda tx: None)
    assert commits == [frozenset(f"t{number}" for number in range(50))]


def test_topics_of_a_failed_piece_wake_nobody(ledger: Ledger) -> None:
    woken = told_by(ledger.store)

    def fail(tx: Connection) -> None:
        tables.touch(tx, "never")
        raise ValueError("no")

    assert isinstance(ledger.store.write(fail).exception(), ValueError)
    ledger.write(lambda tx: tables.touch(tx, "yes"))
    ledger.write(lambda tx: None)
    assert woken == [frozenset({"yes"})]


def test_a_listener_that_fails_does_not_stop_the_writer(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(topics: frozenset[str]) -> None:
        raise RuntimeError("deaf")

    ledger.store.on_commit(fail)
    for _ in range(2):
        ledger.write(lambda tx: tables.touch(tx, "x"))
    ledger.write(lambda tx: None)
    assert "listener" in caplog.text


def test_work_that_was_cancelled_while_it_waited_is_not_done(ledger: Ledger) -> None:
    gate = threading.Event()
    ledger.store.write(lambda tx: gate.wait(10))
    future = ledger.store.write(note("nobody"))
    assert future.cancel()
    gate.set()
    ledger.write(lambda tx: None)
    assert actors(ledger.store) == []


def test_a_reader_does_not_wait_for_the_writer(ledger: Ledger) -> None:
    gate = threading.Event()

    def slow(tx: Connection) -> None:
        audit.append(tx, "slow", "test", "x")
        gate.wait(30)

    future = ledger.store.write(slow)
    assert actors(ledger.store) == []
    gate.set()
    future.result(30)
    assert actors(ledger.store) == ["slow"]


def test_a_full_disk_is_said_and_loses_nothing_else(sqlite_ledger: Ledger) -> None:
    def write_too_much(tx: Connection) -> None:
        pages = tx.scalar(text("PRAGMA page_count")) or 0
        tx.execute(text(f"PRAGMA max_page_count = {pages + 20}"))
        audit.append(tx, "대" * 1_000_000, "test", "x")

    gate = threading.Event()
    sqlite_ledger.store.write(lambda tx: gate.wait(10))
    small = [sqlite_ledger.store.write(note("前"))]
    big = sqlite_ledger.store.write(write_too_much)
    small.append(sqlite_ledger.store.write(note("後")))
    gate.set()
    settle([*small, big])
    assert isinstance(big.exception(), NoSpaceError)
    assert [future.exception() for future in small] == [None, None]
    assert actors(sqlite_ledger.store) == ["後", "前"]


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    last = ledger.store.write(note("last"))
    ledger.store.close()
    ledger.store.close()
    assert last.done()
    with pytest.raises(NotReadyError, match="shutting down"):
        ledger.store.write(note("late"))


WRITER = """
import os, sys
from tunesmith.store import audit
from tunesmith.store.database import Store
import threading
store = Store.open(sys.argv[1])
def go(name):
    number = 0
    while True:
        number += 1
        line = f"{name}-{number}"
        store.write(lambda tx: audit.append(tx, line, "test", "x")).result()
        os.write(1, line.encode() + bytes([10]))
for name in range(8):
    threading.Thread(target=go, args=(name,), daemon=True).start()
threading.Event().wait()
"""


def test_what_was_acknowledged_is_there_after_a_kill(database_url: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, database_url], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert child.stdout is not None
    said = [child.stdout.readline().strip() for _ in range(400)]
    os.kill(child.pid, signal.SIGKILL)
    said += child.stdout.read().split("\n")[:-1]
    child.stdout.close()
    child.wait()
    store = Store.open(database_url)
    kept = actors(store)
    if store.is_alone:
        assert store.read(lambda tx: tx.scalar(text("PRAGMA integrity_check"))) == "ok"
    store.close()
    assert len(said) >= 400
    assert set(said) <= set(kept)
    assert len(kept) == len(set(kept))


def test_a_second_process_is_refused_and_told_what_to_use(sqlite_ledger: Ledger) -> None:
    opener = "import sys; from tunesmith.store.database import Store; Store.open(sys.argv[1])"
    second = subprocess.run(
        [sys.executable, "-c", opener, sqlite_ledger.url], capture_output=True, text=True
    )
    assert second.returncode != 0
    assert "StoreLocked" in second.stderr
    assert "postgresql" in second.stderr
    with pytest.raises(StoreLocked):
        Store.open(sqlite_ledger.url)


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    for _ in range(2):
        Ledger(tmp_path).store.close()


def test_folder_and_files_are_private(sqlite_ledger: Ledger, tmp_path: Path) -> None:
    sqlite_ledger.write(note("x"))
    home = tmp_path / ".tunesmith"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert {path.name for path in home.iterdir()} >= {"db.sqlite", "db.sqlite.lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()} == {0o600}


def test_every_commit_is_synced(sqlite_ledger: Ledger) -> None:
    def pragmas(tx: Connection) -> list[object]:
        names = ("synchronous", "foreign_keys", "journal_mode")
        return [tx.scalar(text(f"PRAGMA {name}")) for name in names]

    mode = "wal" if sqlite.is_wal_safe(sqlite.find_library().sqlite_version_info) else "truncate"
    assert sqlite_ledger.write(pragmas) == [2, 1, mode]
    assert sqlite_ledger.store.read(pragmas) == [2, 1, mode]


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 53, 4), True),
        ((4, 0, 0), True),
    ],
)
def test_wal_is_trusted_only_where_the_library_has_the_fix(
    version: tuple[int, int, int], is_safe: bool
) -> None:
    assert sqlite.is_wal_safe(version) is is_safe


def test_an_old_library_goes_without_wal_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert sqlite.journal_mode((3, 40, 1), tmp_path / "db.sqlite") == "TRUNCATE"
    assert "pysqlite3" in caplog.text


def test_time_comes_from_the_clock_that_was_given(ledger: Ledger) -> None:
    assert ledger.store.read(lambda tx: tx.scalar(select(tables.now()))) == ledger.clock.now
    ledger.clock.pass_by(5)
    assert ledger.write(lambda tx: tx.scalar(select(tables.now()))) == 1_000_005.0


def test_a_store_in_memory_reads_what_it_wrote() -> None:
    store = Store.open("sqlite://")
    store.write(note("기억")).result()
    assert actors(store) == ["기억"]
    store.close()


def test_the_migrations_make_the_tables_of_the_code(ledger: Ledger) -> None:
    def differences(tx: Connection) -> list[Any]:
        found = compare_metadata(MigrationContext.configure(tx), tables.metadata)
        return [one for one in found if getattr(one[1], "name", "") != "ix_jobs_claim_order"]

    assert ledger.store.read(differences) == []
    names = ledger.store.read(
        lambda tx: {str(one["name"]) for one in inspect(tx).get_indexes("jobs")}
    )
    assert {"ix_jobs_claim_order", "ix_jobs_leases", "uq_jobs_unfinished_output"} <= names


def test_a_schema_newer_than_the_code_is_refused(ledger: Ledger) -> None:
    ledger.write(lambda tx: tx.execute(text("update alembic_version set version_num = '9999'")))
    ledger.store.close()
    with pytest.raises(ServerError, match="schema 9999, newer"):
        Store.open(ledger.url)


KILLED_MIGRATION = """
import os, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
left = int(sys.argv[2])
@event.listens_for(Engine, "before_cursor_execute")
def count(connection, cursor, statement, *rest):
    global left
    if statement.startswith(("CREATE", "INSERT", "\\nCREATE")):
        left -= 1
        if left < 0:
            os._exit(9)
from tunesmith.store.database import Store
Store.open(sys.argv[1]).close()
"""


@pytest.mark.parametrize("statements", [1, 9, 20])
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_migration_killed_half_way_is_done_at_the_next_start(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, statements: int
) -> None:
    url = f"sqlite:///{tmp_path}/.tunesmith/db.sqlite"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").database()
    killed = subprocess.run([sys.executable, "-c", KILLED_MIGRATION, url, str(statements)])
    assert killed.returncode == 9
    store = Store.open(url)
    assert store.read(migrate.current) == migrate.known()[-1]
    store.write(note("x")).result()
    store.close()


def test_rows_point_to_rows_that_exist(ledger: Ledger) -> None:
    orphan = {"job_id": "00000000", "seq": 1, "fence": 0, "at": 0.0, "type": "x", "data": {}}
    failure = ledger.store.write(lambda tx: tx.execute(insert(tables.events), orphan)).exception()
    assert "foreign key" in str(failure).lower()
    count = select(func.count()).select_from(tables.events)
    assert ledger.store.read(lambda tx: tx.scalar(count)) == 0

"""PostgreSQL goes away, gets in the way, or is shared: what was acknowledged is there, once."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, select, update
from sqlalchemy.engine import Connection

from servers import Postgres, open_postgres, wait_for
from store_fixtures import LEASE, Ledger, new_ask, new_job
from tunesmith.errors import ConflictError, NotReadyError, ServerError
from tunesmith.store import audit, catalog, duties, idempotency, jobs, migrate, servers, tables
from tunesmith.store.commits import MAX_PAYLOAD_BYTES, payloads
from tunesmith.store.database import Store

SHA = "cd" * 32


@pytest.fixture
def pair(tmp_path: Path, fresh_database: Callable[[], str]) -> Iterator[tuple[Ledger, Ledger]]:
    """Two servers on one database."""
    url = fresh_database()
    both = Ledger(tmp_path, url), Ledger(tmp_path, url)
    yield both
    for ledger in both:
        ledger.store.close()


def note(name: str) -> Callable[[Connection], None]:
    return lambda tx: audit.append(tx, name, "test", "한국어")


def actors(store: Store) -> list[str]:
    return [line.actor for line in store.read(lambda tx: audit.lines(tx, 100_000))]


def test_a_crash_of_the_server_loses_no_acknowledged_row_and_writes_none_twice(
    tmp_path: Path,
) -> None:
    with open_postgres(tmp_path / "postgres") as cluster:
        store = Store.open(cluster.database())
        is_over = threading.Event()
        kept: list[str] = []

        def write(which: int) -> None:
            number = 0
            while not is_over.is_set():
                number += 1
                name = f"{which}-{number}"
                with contextlib.suppress(NotReadyError):
                    store.write(note(name)).result()
                    kept.append(name)

        with ThreadPoolExecutor(4) as pool:
            writing = [pool.submit(write, which) for which in range(4)]
            try:
                for _ in range(10):
                    _wait_for_more(kept, 20)
                    cluster.restart()
                _wait_for_more(kept, 1)
            finally:
                is_over.set()
            for one in writing:
                one.result()
        times = Counter(actors(store))
        store.close()
    assert len(kept) == len(set(kept))
    assert set(kept) <= set(times)
    assert max(times.values()) == 1


def _wait_for_more(kept: list[str], rows: int) -> None:
    before = len(kept)
    wait_for(lambda: len(kept) >= before + rows, "more rows")


class Proxy:
    """A line to PostgreSQL that can be cut where it hurts most: at the next COMMIT.

    `when` is "before" or "after" the server gets to hear it; None lets everything through.
    """

    def __init__(self, port: int) -> None:
        self.when: str | None = None
        self.cuts = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                self._start(self._carry, near, far, True)
                self._start(self._carry, far, near, False)

    def _carry(self, source: socket.socket, target: socket.socket, is_asking: bool) -> None:
        with contextlib.suppress(OSError):
            while words := source.recv(65536):
                is_cut = is_asking and self.when is not None and b"COMMIT" in words
                if is_cut and self.when == "before":
                    self._cut(source, target)
                    break
                if is_cut:  # its answer finds nobody
                    source.shutdown(socket.SHUT_RDWR)
                    self.when, self.cuts = None, self.cuts + 1
                target.sendall(words)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self, *ends: socket.socket) -> None:
        self.when, self.cuts = None, self.cuts + 1
        for end in ends:
            end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[Proxy]:
    made = Proxy(postgres.port)
    yield made
    made.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_commit_whose_connection_breaks_is_never_a_guess(
    fresh_database: Callable[[], str], proxy: Proxy, when: str, pieces: int
) -> None:
    store = Store.open(through(proxy, fresh_database()))
    store.write(note("first")).result()
    gate = threading.Event()
    store.write(lambda tx: gate.wait(10) and None)
    futures = [store.write(note(f"做-{number}")) for number in range(pieces)]
    proxy.when = when
    gate.set()
    for future in futures:
        future.result(60)
    found = sorted(actors(store))
    cuts = proxy.cuts
    store.close()
    assert cuts == 1
    assert found == sorted(["first", *(f"做-{number}" for number in range(pieces))])


def test_a_read_survives_the_loss_of_every_idle_connection(pair: tuple[Ledger, Ledger]) -> None:
    one, other = pair
    one.write(note("x"))
    assert actors(one.store) == ["x"]
    other.write(_end_all_others)
    assert actors(one.store) == ["x"]


def _end_all_others(tx: Connection) -> None:
    tx.exec_driver_sql(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )


def test_a_server_that_stays_away_is_told_of_and_come_back_is_used(tmp_path: Path) -> None:
    with open_postgres(tmp_path / "postgres") as cluster:
        store = Store.open(cluster.database())
        store._writer._patience = 0.5  # type: ignore[attr-defined]
        cluster.stop("immediate")
        with pytest.raises(NotReadyError, match="can't be reached"):
            store.write(note("lost")).result()
        with pytest.raises(NotReadyError):
            actors(store)
        cluster.start()
        store.write(note("後")).result()
        assert actors(store) == ["後"]
        store.close()


FROZEN = """
import os, signal, sys
from sqlalchemy import update
from tunesmith.store import tables
from tunesmith.store.database import Store
store = Store.open(sys.argv[1])
was_frozen = False
def work(tx):
    global was_frozen
    tx.execute(update(tables.quotas).values(unfinished=tables.quotas.c.unfinished + 1))
    if not was_frozen:
        was_frozen = True
        os.write(1, b"frozen\\n")
        os.kill(os.getpid(), signal.SIGSTOP)
    tx.execute(update(tables.quotas).values(unfinished=tables.quotas.c.unfinished + 10))
store.write(work).result()
os.write(1, b"done\\n")
"""


def test_a_process_frozen_in_a_transaction_holds_nobody_up(pair: tuple[Ledger, Ledger]) -> None:
    one = pair[0]
    one.submit(owner="a")
    url = one.url + "?options=-c%20idle_in_transaction_session_timeout%3D500"
    child = subprocess.Popen([sys.executable, "-c", FROZEN, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "frozen\n"
        one.submit(owner="a")  # waits for the frozen one's row
        os.kill(child.pid, signal.SIGCONT)
        assert child.stdout.readline() == "done\n"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    unfinished = one.store.read(lambda tx: tx.scalar(select(tables.quotas.c.unfinished)))
    assert unfinished == 2 + 11


def test_two_groups_in_a_deadlock_are_both_done_once(pair: tuple[Ledger, Ledger]) -> None:
    for owner in "ab":
        pair[0].submit(owner=owner)
    first = {"ab": True, "ba": True}
    meeting = threading.Barrier(2, timeout=30)

    def add(tx: Connection, order: str) -> None:
        for owner in order:
            quotas = tables.quotas
            more = quotas.c.unfinished + 1
            tx.execute(update(quotas).where(quotas.c.owner == owner).values(unfinished=more))
            if owner == order[0] and first[order]:
                first[order] = False
                meeting.wait()

    futures = [
        ledger.store.write(partial(add, order=order))
        for ledger, order in zip(pair, ("ab", "ba"), strict=True)
    ]
    for future in futures:
        future.result(60)
    counted = pair[0].store.read(lambda tx: tx.execute(select(tables.quotas)).tuples().all())
    assert dict(counted) == {"a": 3, "b": 3}


def test_a_commit_is_heard_of_in_another_server_also_after_its_ear_was_cut_off(
    pair: tuple[Ledger, Ledger],
) -> None:
    one, other = pair
    told: list[str] = []
    one.store.on_commit(told.extend)
    other.write(lambda tx: tables.touch(tx, "job:글"))
    wait_for(lambda: "job:글" in told, "the other's commit")
    own: list[str] = []
    other.store.on_commit(own.extend)
    other.write(lambda tx: tables.touch(tx, "mine"))
    wait_for(lambda: "mine" in told, "the other's commit")
    assert own.count("mine") == 1
    told.clear()
    other.write(_end_all_others)
    wait_for(lambda: tables.ALL in told, "the new ear")
    told.clear()
    other.write(lambda tx: tables.touch(tx, "again"))
    wait_for(lambda: "again" in told or tables.ALL in told, "what came after")


def test_many_topics_travel_in_parts_that_fit() -> None:
    topics = {f"worker:{'길' * 50}-{number}" for number in range(300)} | {"x" * 10_000}
    parts = list(payloads("me", topics))
    assert max(len(part.encode()) for part in parts) <= MAX_PAYLOAD_BYTES + 1
    import json

    said = [json.loads(part) for part in parts]
    assert {part[0] for part in said} == {"me"}
    carried = {topic for part in said for topic in part[1:]}
    assert carried == (topics - {"x" * 10_000}) | {tables.ALL}


OPEN = "import sys; from tunesmith.store.database import Store; Store.open(sys.argv[1]).close()"


def test_servers_that_start_at_once_migrate_once(postgres: Postgres) -> None:
    url = postgres.database()
    starting = [subprocess.Popen([sys.executable, "-c", OPEN, url]) for _ in range(3)]
    assert [one.wait(120) for one in starting] == [0, 0, 0]
    store = Store.open(url)
    assert store.read(migrate.current) == migrate.known()[-1]
    store.close()


def test_a_database_that_can_t_hold_every_text_is_refused(postgres: Postgres) -> None:
    with postgres.connect() as connection:
        connection.execute(
            "create database narrow encoding 'SQL_ASCII' template template0 locale 'C'"
        )
    with pytest.raises(ServerError, match="UTF8"):
        Store.open(postgres.url("narrow"))
    with pytest.raises(ServerError, match="can't be opened"):
        Store.open(postgres.url("nowhere"))
    with pytest.raises(ServerError, match="PostgreSQL"):
        Store.open("mysql+pymysql://x/y")


def test_a_job_is_claimed_once_by_two_servers_and_a_claim_sent_to_both_is_one(
    pair: tuple[Ledger, Ledger],
) -> None:
    made = sorted(pair[0].submit().id for _ in range(60))
    taken: list[str] = []

    def claim_all(which: int) -> None:
        for number in range(1000):
            ask = new_ask(f"w{which}", f"{which}-{number}")
            claimed = pair[which % 2].write(partial(jobs.claim, ask=ask, lease_seconds=LEASE))
            if claimed is None:
                return
            taken.append(claimed.job.id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(claim_all, range(8)))
    assert sorted(taken) == made

    for number in range(20):
        pair[0].submit()
        pair[0].submit()
        ask = new_ask("w9", f"same-{number}")
        work = partial(jobs.claim, ask=ask, lease_seconds=LEASE)
        both = [ledger.store.write(work) for ledger in pair]
        found = [future.result(60) for future in both]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0].job.id == found[1].job.id
        assert found[0].token == found[1].token
        pair[0].claim()


def test_what_two_servers_make_at_once_is_made_once(pair: tuple[Ledger, Ledger]) -> None:
    def upload(tx: Connection) -> catalog.Upload:
        return catalog.add_upload(
            tx,
            owner="a",
            filename="글.jsonl",
            sha256=SHA,
            size_bytes=1,
            should_reuse=False,
        )

    def submit(tx: Connection) -> str:
        kept = idempotency.find(tx, "a", "/x", "key", SHA)
        if kept is not None:
            return str(kept.response["job_id"])
        job = jobs.submit(tx, new_job(owner="b"), max_unfinished=9, outputs_root="/o")
        answer = idempotency.Stored(status=200, response={"job_id": job.id})
        if not idempotency.keep(tx, "a", "/x", "key", SHA, answer):
            raise ConflictError("there is an answer")
        return job.id

    uploads = [ledger.store.write(upload) for _ in range(5) for ledger in pair]
    assert len({future.result(60).name for future in uploads}) == 10
    submitted = [ledger.store.write(submit) for _ in range(5) for ledger in pair]
    done = [future.result(60) for future in submitted if future.exception(60) is None]
    assert len(set(done)) == 1
    assert len(pair[0].store.read(jobs.list_jobs)) == 1
    folders = [
        ledger.store.write(
            lambda tx: jobs.submit(
                tx, new_job(output_dir="/ws/곳"), max_unfinished=9, outputs_root="/o"
            )
        )
        for ledger in pair
    ]
    refused = [future.exception(60) for future in folders]
    assert sum(one is None for one in refused) == 1
    assert sum(isinstance(one, ConflictError) for one in refused) == 1


def test_a_duty_has_one_holder_until_its_lease_ends(ledger: Ledger) -> None:
    def take(holder: str, name: str = "checks") -> bool:
        is_free = ledger.store.read(lambda tx: duties.may_take(tx, name, holder))
        taken = ledger.write(lambda tx: duties.take(tx, name, holder, 10))
        assert is_free == taken
        return taken

    assert take("a")
    assert not take("b")
    assert take("b", "outbox")
    ledger.clock.pass_by(8)
    assert take("a")
    ledger.clock.pass_by(8)
    assert not take("b")
    ledger.clock.pass_by(3)
    assert take("b")
    assert not take("a")
    ledger.write(lambda tx: duties.release(tx, "b"))
    assert take("a")


def test_a_clock_set_back_leaves_no_duty_with_the_dead(ledger: Ledger) -> None:
    assert ledger.write(lambda tx: duties.take(tx, "checks", "dead", 10))
    ledger.clock.pass_by(-3600)
    assert ledger.write(lambda tx: duties.take(tx, "checks", "alive", 10))


def test_servers_know_of_each_other_while_they_are_seen(ledger: Ledger) -> None:
    for name in "ab":
        ledger.write(partial(servers.seen, server_id=name, host={"name": "호스트"}))
    others = partial(servers.others, server_id="a", within_seconds=10)
    assert ledger.store.read(others) == [{"name": "호스트"}]
    ledger.clock.pass_by(11)
    assert ledger.store.read(others) == []
    ledger.write(partial(servers.seen, server_id="b", host={"name": "other"}))
    assert ledger.store.read(others) == [{"name": "other"}]
    ledger.write(partial(servers.leave, server_id="b"))
    assert ledger.store.read(others) == []
    ledger.clock.pass_by(servers.KEEP_SECONDS)
    assert ledger.write(servers.sweep) == 1


def through(proxy: Proxy, url: str) -> str:
    return make_url(url).set(port=proxy.port).render_as_string()

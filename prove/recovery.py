"""How soon things are back: the API with many jobs, a dead worker's job, a restarted database."""

import signal
import time

from house import PATIENCE
from prove.benches import bench, database_arguments
from prove.fleet import LEASE_SECONDS, Client, Fleet, Ledger, open_fleet
from prove.processes import Process, cpu_seconds, family
from prove.proof import Figure, Progress, Result, Setting, at_most, join
from prove.rows import Rows

AGAIN_SECONDS = 2.0
"""Over the lease, until a dead worker's job runs again."""
FIRST_WRITE_SECONDS = 5.0


def run(setting: Setting, progress: Progress) -> Result:
    rounds = setting.count(5, 20)
    results = []
    for database in setting.databases:
        with open_fleet(setting.inner(database), database, 2, ("api", "--no-worker")) as fleet:
            results.append(_dead_workers(fleet, database, rounds, progress))
            if fleet.cluster is not None:
                results.append(_restarts(fleet, rounds, progress))
            fleet.stop()
    progress(rounds, rounds, "a start with 10,000 jobs")
    return join([*results, bench(setting, "ready", *database_arguments(setting))])


def _dead_workers(fleet: Fleet, database: str, rounds: int, progress: Progress) -> Result:
    """Seconds from a worker's kill -9 until another one's trainer has said its first word."""
    rows, took = Rows.of(fleet.house), []
    for number in range(rounds):
        progress(number, rounds, f"{database}: dead workers")
        fleet.revive()
        _wait_until_warm(fleet)
        job_id = fleet.house.submit(num_epochs=9999, save_steps=20, learning_rate=1e-3)
        fleet.house.wait_event(job_id, "checkpointed")
        _worker_of(fleet).send(signal.SIGKILL)
        began = time.monotonic()
        while not rows.ask(_AGAIN, job_id=job_id):
            assert time.monotonic() - began < 60, "it never ran again"
            time.sleep(0.02)
        took.append(time.monotonic() - began)
        with Client(fleet.url) as client:
            Ledger().cancel(client, job_id, is_forced=True)
        fleet.house.wait_end(job_id)
    what = f"{database}: a dead worker's job runs again, worst of {rounds}"
    told = {"seconds": [round(one, 2) for one in took], "lease_seconds": LEASE_SECONDS}
    figure = at_most(what, max(took), LEASE_SECONDS + AGAIN_SECONDS)
    return Result((figure,), {f"{database}: dead workers": told})


def _wait_until_warm(fleet: Fleet) -> None:
    """Until every host has a forking process that has loaded all it needs, and rests."""
    deadline = time.monotonic() + PATIENCE
    before: dict[int, float] = {}
    while time.monotonic() < deadline:
        used = {one.pid: cpu_seconds(one.pid) for one in fleet.living("forker")}
        if len(used) == len(fleet.hosts) and used == before and min(used.values()) > 1:
            return
        before = used
        time.sleep(1)
    raise TimeoutError("a forking process never came to rest")


_AGAIN = "select 1 as found from events where job_id = :job_id and fence = 2 and type = 'started'"


def _worker_of(fleet: Fleet) -> Process:
    """The one that has a trainer."""
    everyone = fleet.living()
    for worker in fleet.living("worker"):
        if any(one.role == "trainer" for one in family(worker, everyone)):
            return worker
    raise AssertionError("no worker has a trainer")


def _restarts(fleet: Fleet, rounds: int, progress: Progress) -> Result:
    """Seconds from PostgreSQL's answering again until a submission is acknowledged."""
    assert fleet.cluster is not None
    ledger, took = Ledger(), []
    with Client(fleet.url) as client:
        for number in range(rounds):
            progress(number, rounds, "PostgreSQL restarts")
            fleet.cluster.restart("immediate")
            began = time.monotonic()
            ledger.submit(client, f"restart-{number}", {"max_steps": 1})
            took.append(time.monotonic() - began)
    rows = Rows.of(fleet.house)
    there = {row["id"] for row in rows.ask("select id from jobs")}
    lost = set(ledger.accepted) - there
    figures = (
        at_most(
            f"PostgreSQL restart: first write, worst of {rounds}", max(took), FIRST_WRITE_SECONDS
        ),
        Figure("PostgreSQL restart: acknowledged, then lost", "0", str(len(lost)), not lost),
    )
    return Result(figures, {"restarts": {"seconds": [round(one, 2) for one in took]}})

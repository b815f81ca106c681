"""A thousand cancels, each at a bad moment: around the claim, the start, a step, the end.

Most of the trainers are played (`puppet.py`), so that a moment can be aimed at; some are real, and
some of these are frozen, so that they must be killed.
"""

import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil

from prove.checker import Faults, Remains, check
from prove.fleet import Client, Fleet, Ledger, open_fleet
from prove.processes import living, wait_until_gone
from prove.proof import Progress, Result, Setting, at_least, at_most, join, none_of
from prove.puppet import Puppet
from prove.rows import Rows

MOMENTS = ("submit", "claim", "start", "step", "finish", "finish")
PUPPETS = 8
WAITING = 24
"""Jobs under way at once."""
GRACE_SECONDS = 1.0


def run(setting: Setting, progress: Progress) -> Result:
    """1,000 races: most played, some with real trainers; half of them on each database."""
    played, real = setting.count(960, 4800), setting.count(40, 200)
    share = len(setting.databases)
    races = [
        part
        for database in setting.databases
        for part in (
            _played(setting, progress, database, played // share),
            _real(setting, progress, database, real // share),
        )
    ]
    return join([*races, _forced(setting, progress)])


# played


class Races:
    """Jobs, each with the moment at which its cancel is sent, a few milliseconds off."""

    def __init__(self, fleet: Fleet, dice: random.Random) -> None:
        self.fleet, self.dice = fleet, dice
        self.ledger = Ledger()
        self.client = Client(fleet.url)
        self.moments: dict[str, str] = {}
        self.sent: Counter[str] = Counter()
        self.pool = ThreadPoolExecutor(16)
        self.flights: list[Future[None]] = []
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def submit(self, number: int) -> None:
        moment = self.dice.choice(MOMENTS)
        job_id = self.ledger.submit(self.client, f"race-{number}", {"max_steps": 3})
        with self._lock:
            self.moments[job_id] = moment
        self.told(job_id, "submit")

    def told(self, job_id: str, moment: str) -> None:
        """A job is at this moment: cancel it where that is its own."""
        with self._lock:
            if self.moments.get(job_id) != moment:
                return
            del self.moments[job_id]
            self.sent[moment] += 1
            self.flights.append(self.pool.submit(self._cancel, job_id, self.dice.uniform(0, 0.008)))

    def _cancel(self, job_id: str, pause: float) -> None:
        time.sleep(pause)
        try:
            self.ledger.cancel(self.client, job_id, int(job_id, 16) % 4 == 0)
        except Exception as error:
            self.errors.append(f"{job_id}: {error}")


def _played(setting: Setting, progress: Progress, database: str, count: int) -> Result:
    folder, dice = setting.inner(f"{database}-played"), setting.dice(database)
    with open_fleet(
        folder, database, 0, ("api", "--no-worker"), TUNESMITH_MAX_QUEUED_JOBS="100000"
    ) as fleet:
        races = Races(fleet, dice)
        token = (fleet.house.home / "worker.token").read_text().strip()
        puppets = [
            Puppet(fleet.url, token, n, setting.dice(database, n), races.told)
            for n in range(PUPPETS)
        ]
        _race(races, puppets, count, progress)
        for puppet in puppets:
            puppet.close()
        races.client.close()
        fleet.stop()
        remains = Remains.read(fleet.house, races.ledger)
        faults = check(remains)
    faults["broke off"] += [repr(one.failure) for one in puppets if one.failure] + races.errors
    counts = {
        "moments": dict(races.sent),
        "acknowledged": len(races.ledger.cancelled),
        "refused": len(races.ledger.refused),
        "fenced": sum(puppet.fenced for puppet in puppets),
    }
    raced = sum(races.sent.values())
    return _judged(f"{database}, played", raced, count, faults, counts)


def _race(races: Races, puppets: list[Puppet], count: int, progress: Progress) -> None:
    rows = Rows.of(races.fleet.house)
    deadline = time.monotonic() + 120 + count
    submitted = 0
    while time.monotonic() < deadline and not any(one.failure for one in puppets):
        unfinished = rows.unfinished()
        raced = sum(races.sent.values())
        progress(raced, count, "cancel races")
        if raced >= count and not unfinished:
            break
        for _ in range(min(WAITING - unfinished, 0 if raced >= count else WAITING)):
            races.submit(submitted)
            submitted += 1
        time.sleep(0.02)
    races.pool.shutdown(wait=True)


def _judged(name: str, raced: int, wanted: int, faults: Faults, counts: dict[str, Any]) -> Result:
    found = [one for sentences in faults.values() for one in sentences]
    figures = (
        at_least(f"{name}: cancel races", raced, wanted),
        none_of(f"{name}: more or less than one end, or a wrong one", found, f"{raced}"),
    )
    some = {rule: sentences[:20] for rule, sentences in faults.items() if sentences}
    return Result(figures, {name: {**counts, "faults": some}})


# real trainers


def _real(setting: Setting, progress: Progress, database: str, count: int) -> Result:
    folder, dice = setting.inner(f"{database}-real"), setting.dice("real", database)
    with open_fleet(folder, database, hosts=0) as fleet:
        ledger = Ledger()
        body = {"num_epochs": 2, "save_steps": 5, "learning_rate": 1e-3}
        with Client(fleet.url) as client:
            for number in range(count):
                job_id = ledger.submit(client, f"real-{number}", body)
                time.sleep(dice.uniform(0, 2.5))
                ledger.cancel(client, job_id, dice.random() < 0.3)
                progress(number + 1, count, "cancels of real trainers")
        for job_id in ledger.accepted:
            fleet.house.wait_end(job_id)
        trainers = {one.pid for one in living(fleet.house.workspace) if one.role == "trainer"}
        orphans = wait_until_gone(trainers, 10)
        left = fleet.stop()
        remains = Remains.read(fleet.house, ledger)
        faults = check(remains)
    faults["orphan"] += [f"trainer {pid} is left" for pid in orphans] + [str(one) for one in left]
    counts = {"acknowledged": len(ledger.cancelled), "refused": len(ledger.refused)}
    return _judged(f"{database}, real", count, count, faults, counts)


def _forced(setting: Setting, progress: Progress) -> Result:
    """Trainers that do not listen: frozen, with the cancel's grace or without any."""
    rounds = setting.count(10, 30)
    took: list[float] = []
    left: list[str] = []
    grace = str(GRACE_SECONDS)
    folder = setting.inner("forced")
    with open_fleet(folder, "sqlite", hosts=0, TUNESMITH_GRACE_SECONDS=grace) as fleet:
        house = fleet.house
        for number in range(rounds):
            job_id = house.submit(num_epochs=9999, learning_rate=1e-3)
            house.wait_event(job_id, "step")
            trainer = house.trainer(job_id)
            trainer.send_signal(signal.SIGSTOP)
            took.append(_time_to_end(fleet, job_id, trainer, number % 2 == 1))
            pids = {one.pid for one in living(house.workspace) if one.role == "trainer"}
            left += [f"round {number}: {pid}" for pid in pids]
            progress(number + 1, rounds, "forced stops")
    worst = max(took)
    figures = (
        at_most(f"forced stop of a frozen trainer, worst of {rounds}", worst, GRACE_SECONDS + 1),
        none_of("processes left after a forced stop", left, f"{rounds}"),
    )
    return Result(figures, {"forced": {"seconds": [round(one, 3) for one in took]}})


def _time_to_end(fleet: Fleet, job_id: str, trainer: psutil.Process, is_forced: bool) -> float:
    """From the answer to a cancel until the process has gone and the job has ended."""
    with Client(fleet.url) as client:
        assert Ledger().cancel(client, job_id, is_forced)
    began = time.monotonic()
    wait_until_gone({trainer.pid}, 30)
    took = time.monotonic() - began
    assert fleet.house.wait_end(job_id)["status"] == "cancelled"
    return took

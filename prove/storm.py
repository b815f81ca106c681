"""A storm: parts of a busy house are killed or frozen at random, until a number is reached.

Killed with SIGKILL: the API, workers, forking processes, trainers. A zombie is a worker frozen with
SIGSTOP, with or without its trainers, until its lease is long over and another attempt has taken
its job; then it is woken and goes on with what it believed in. Jobs come all the while, some are
cancelled. In the end nothing may show but the lost time: see `checker.py`.
"""

import random
import signal
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import OperationalError

from prove.checker import Remains, check, fenced_words
from prove.fleet import LEASE_SECONDS, Client, Fleet, Ledger, clear, open_fleet
from prove.processes import Process, family, wait_until_gone
from prove.proof import Progress, Result, Setting, at_least, join, none_of
from prove.rows import Rows
from receivers import Receiver, Say

ZOMBIE_LEASES = 3
OVERTAKEN_SECONDS = 30.0
"""How long a zombie waits at most for its job to be taken by another."""
END_SECONDS = 300.0
"""For what is left to be done, once the storm is over."""
BUSY = 6
"""Unfinished jobs that are kept waiting or running."""
TARGETS = {"trainer": 14, "api": 2, "worker": 2, "forker": 1}
"""How often each is chosen."""
MISCHIEF = 0.12
"""How often something else happens, which counts as no kill: an orderly stop, a frozen API, a
crash of PostgreSQL."""


def run(setting: Setting, progress: Progress) -> Result:
    """200 kills and 40 zombies, or 1,000 and 200: half of them on each database."""
    share = 1 / len(setting.databases)
    kills = round(setting.count(200, 1000) * share)
    zombies = round(setting.count(40, 200) * share)
    return join([storm(setting, progress, one, kills, zombies) for one in setting.databases])


def storm(
    setting: Setting, progress: Progress, database: str, kills: int, zombies: int, hosts: int = 2
) -> Result:
    """With so many hosts beside the house's own; one that is frozen needs another to take over."""
    folder = setting.inner(database)
    with closing(Receiver()) as receiver, open_fleet(folder, database, hosts, apis=2) as fleet:
        raging = Storm(fleet, setting.dice(database), kills, zombies, database, progress)
        raging.listen(receiver)
        raging.rage()
        raging.settle()
        idle = raging.idle_orphans()
        raging.ledger.heard |= {message.id for message in receiver.at("/hook")}
        raging.client.close()
        left = fleet.stop()
        remains = Remains.read(fleet.house, raging.ledger)
        faults = check(remains)
    faults["orphan"] += [*idle, *(f"{one} is left after the stop" for one in left)]
    faults["server error"] += raging.client.server_errors
    result = _result(raging, remains, faults)
    if result.is_met:
        clear(folder)
    return result


@dataclass
class Frozen:
    """A zombie: what was frozen, and the attempts that it held."""

    processes: list[Process]
    held: dict[str, int]
    """Fence by job."""
    since: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        return time.monotonic() - self.since


@dataclass
class Storm:
    fleet: Fleet
    dice: random.Random
    kills: int
    zombies: int
    name: str
    progress: Progress
    done: Counter[str] = field(default_factory=Counter)
    frozen: list[Frozen] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.client = Client(*self.fleet.urls)
        self.rows = Rows.of(self.fleet.house)
        self._is_over = threading.Event()
        self._failure: Exception | None = None

    @property
    def fenced(self) -> int:
        own = self.fleet.house.workspace / "logs" / "worker.log"
        return fenced_words(own, *(host.workspace / "worker.log" for host in self.fleet.hosts))

    @property
    def killed(self) -> int:
        return sum(self.done[role] for role in TARGETS)

    def listen(self, receiver: Receiver) -> None:
        """A receiver of webhooks that refuses each fifth message at first."""
        receiver.answers["/hook"] += [Say(500) if n % 5 == 0 else Say() for n in range(1000)]
        types = [f"fine_tuning.job.{state}" for state in ("succeeded", "failed", "cancelled")]
        body = {"name": "폭풍", "url": receiver.url("/hook"), "event_types": types}
        reply = self.client.post("/v1/webhook_endpoints", body)
        assert reply.status_code in (200, 201), reply.text

    def rage(self) -> None:
        users = threading.Thread(target=self._live_on, daemon=True)
        users.start()
        try:
            while self.killed < self.kills or self.done["zombie"] < self.zombies:
                time.sleep(self.dice.uniform(0.05, 1.0))
                self._strike()
                self._wake()
                self.fleet.revive()
                self.progress(self.killed + self.done["zombie"], self.kills + self.zombies, "")
                if self._failure is not None:
                    raise self._failure
        finally:
            self._is_over.set()
            self._wake(is_last=True)
        self.fleet.revive()
        users.join(60)

    def _strike(self) -> None:
        if not self.fleet.living("trainer") and self.dice.random() > 0.2:
            return  # a house that does nothing is no target
        if self.dice.random() < MISCHIEF:
            self._disturb()
        wants_zombie = self.done["zombie"] + len(self.frozen) < self.zombies
        share = self.zombies / (self.kills + self.zombies)
        if wants_zombie and (self.dice.random() < 2 * share or self.killed >= self.kills):
            self._freeze()
        elif self.killed < self.kills:
            self._kill(self.dice.choices([*TARGETS], [*TARGETS.values()])[0])

    def _kill(self, role: str) -> None:
        icy = {process.pid for one in self.frozen for process in one.processes}
        found = [one for one in self.fleet.living(role) if one.pid not in icy]
        if not found:
            return
        chosen = self.dice.choice(found)
        self.done[role] += chosen.send(signal.SIGKILL)
        for api in self.fleet.apis:
            if api.process is not None and api.process.pid == chosen.pid:
                api.process.wait()

    def _disturb(self) -> None:
        kind = self.dice.choice(["stop worker", "stop api", "freeze api", "crash database"])
        if kind == "crash database":
            if self.fleet.cluster is None:
                return
            self.fleet.cluster.restart("immediate")
        elif kind == "freeze api":
            self._hold_api(self.dice.uniform(0.5, 2) * LEASE_SECONDS)
        else:
            role = kind.removeprefix("stop ")
            found = self.fleet.living(role)
            if not found or not self.dice.choice(found).send(signal.SIGTERM):
                return
        self.done[kind] += 1

    def _hold_api(self, seconds: float) -> None:
        """All of them, so that leases run out and the workers are not to blame; or one of them."""
        held = self.fleet.living("api")
        if held and self.dice.random() < 0.5:
            held = [self.dice.choice(held)]
        for process in held:
            process.send(signal.SIGSTOP)
        time.sleep(seconds)
        _thaw(held)

    # zombies

    def _freeze(self) -> None:
        """A worker that holds a job, where another worker is left to take it."""
        if len(self.frozen) > 1:
            return
        everyone = self.fleet.living()
        icy = {process.pid for one in self.frozen for process in one.processes}
        workers = [one for one in everyone if one.role == "worker" and one.pid not in icy]
        busy = [one for one in workers if _trainers(one, everyone)]
        if len(workers) < 2 or not busy:
            return
        worker = self.dice.choice(busy)
        members = family(worker, everyone) if self.dice.random() < 0.6 else [worker]
        held = self._held_by(worker)
        for member in members:
            member.send(signal.SIGSTOP)
        if held:
            self.frozen.append(Frozen(members, held))
        else:
            _thaw(members)

    def _held_by(self, worker: Process) -> dict[str, int]:
        rows = self.rows.ask(
            "select j.id, j.fence, w.host from jobs j join workers w on w.id = j.worker_id "
            "where j.state in ('starting', 'running')"
        )
        return {row["id"]: row["fence"] for row in rows if row["host"]["pid"] == worker.pid}

    def _wake(self, is_last: bool = False) -> None:
        for one in list(self.frozen):
            is_due = one.age > ZOMBIE_LEASES * LEASE_SECONDS
            is_overtaken = is_due and self._is_overtaken(one)
            if is_overtaken or is_last or one.age > OVERTAKEN_SECONDS:
                _thaw(one.processes)
                self.frozen.remove(one)
                self.done["zombie" if is_overtaken else "zombie in vain"] += 1

    def _is_overtaken(self, one: Frozen) -> bool:
        fences = {row["id"]: row["fence"] for row in self.rows.ask("select id, fence from jobs")}
        return any(fences[job_id] > fence for job_id, fence in one.held.items())

    # users

    def _live_on(self) -> None:
        try:
            while not self._is_over.is_set():
                with suppress(OperationalError):  # the database is down
                    self._submit_some()
                time.sleep(0.2)
        except Exception as error:
            self._failure = error

    def _submit_some(self) -> None:
        for _ in range(BUSY - self.rows.unfinished()):
            number = len(self.ledger.accepted)
            job_id = self.ledger.submit(self.client, f"{self.name}-{number}", self._body())
            if self.dice.random() < 0.2:
                threading.Timer(self.dice.uniform(0, 8), self._cancel, [job_id]).start()

    def _cancel(self, job_id: str) -> None:
        try:
            self.ledger.cancel(self.client, job_id, self.dice.random() < 0.3)
        except Exception as error:
            self._failure = error

    def _body(self) -> dict[str, Any]:
        return {
            "num_epochs": self.dice.choice([1, 3, 8]),
            "use_lora": self.dice.random() < 0.6,
            "lora_dropout": 0.1,
            "save_steps": self.dice.choice([3, 5, 8]),
            "learning_rate": 1e-3,
            "suffix": self.dice.choice(["강물", "石头", "river", "夜"]),
            "seed": self.dice.randrange(1000),
        }

    # the end

    def settle(self) -> None:
        """Until every job has ended and all that is owed has come. What has not by then, the
        checker tells of."""
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            self.fleet.revive()
            with suppress(Exception):
                if not (self.rows.unfinished() or self.rows.ask(_OWED) or self._receipts()):
                    return
            self.progress(self.killed + self.done["zombie"], self.kills + self.zombies, "settling")
            time.sleep(0.3)

    def _receipts(self) -> bool:
        """Whether a worker still has an outcome to tell."""
        places = (place / ".tunesmith" for place in self.fleet.workspaces)
        return any(any(place.glob("jobs/*/attempts/*/exit.json")) for place in places)

    def idle_orphans(self) -> list[str]:
        """With no job left, no trainer may be."""
        pids = {one.pid: one for one in self.fleet.living("trainer")}
        return [f"{pids[pid]} is left with no job" for pid in wait_until_gone(pids, 10)]


_OWED = "select id from outbox where done_at is null"


def _trainers(worker: Process, everyone: list[Process]) -> bool:
    return any(one.role == "trainer" for one in family(worker, everyone))


def _thaw(processes: list[Process]) -> None:
    for process in reversed(processes):
        process.send(signal.SIGCONT)


def _result(raging: Storm, remains: Remains, faults: dict[str, list[str]]) -> Result:
    name, done = raging.name, raging.done
    jobs = len(raging.ledger.accepted)
    figures = [
        at_least(f"{name}: kill -9", raging.killed, raging.kills),
        at_least(f"{name}: SIGSTOP zombies overtaken", done["zombie"], raging.zombies),
        *(none_of(f"{name}: {rule}", found, f"{jobs} jobs") for rule, found in _told(faults)),
    ]
    counts = {
        "jobs": jobs,
        "killed": dict(done),
        "attempts": sum(map(len, remains.attempts.values())),
        "events": sum(map(len, remains.events.values())),
        "cancels acknowledged": len(raging.ledger.cancelled),
        "cancels refused": len(raging.ledger.refused),
        "attempts fenced": raging.fenced,
    }
    return Result(tuple(figures), {name: counts, f"{name} faults": _some(faults)})


def _told(faults: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """The rules of the published table, each on a line; the others on one."""
    shown = {
        "lost": ["lost", "wrong end", "cancel"],
        "run twice to an end": ["twice"],
        "stale writes": ["stale", "artifact"],
        "gaps in seq": ["gap"],
        "orphan processes": ["orphan"],
    }
    lines = [
        (title, [one for rule in rules for one in faults[rule]]) for title, rules in shown.items()
    ]
    known = {rule for rules in shown.values() for rule in rules}
    rest = [one for rule, found in faults.items() if rule not in known for one in found]
    return [*lines, ("anything else", rest)]


def _some(faults: dict[str, list[str]], most: int = 20) -> dict[str, list[str]]:
    return {rule: found[:most] for rule, found in faults.items() if found}

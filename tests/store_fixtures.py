"""A store on a virtual clock, and short words for what its tests say often."""

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy.engine import Connection, make_url

from servers import Postgres
from tunesmith.errors import FailureClass
from tunesmith.spec.hands import Capacity, NumberedEvent, Orders, WorkAsk
from tunesmith.spec.records import Job, JobEvent, NewJob, Outcome, Source, StopMode
from tunesmith.spec.train import Sft
from tunesmith.store import events, jobs
from tunesmith.store.database import Store

T = TypeVar("T")
LEASE = 60.0
SHA = "ab" * 32
PLAN = {"threads": 1}


class Clock:
    """Unix seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Ledger:
    """A store, asked step by step."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self.clock = Clock()
        self.url = url or f"sqlite:///{folder}/.tunesmith/db.sqlite"
        self.store = Store.open(self.url, clock=self.clock)
        self._claims = 0

    def write(self, work: Callable[[Connection], T]) -> T:
        return self.store.write(work).result(timeout=60)

    def submit(self, max_unfinished: int = 1000, **over: Any) -> Job:
        new = new_job(**over)
        return self.write(
            lambda tx: jobs.submit(
                tx, new, max_unfinished=max_unfinished, outputs_root="/ws/outputs"
            )
        )

    def get(self, job_id: str) -> Job:
        return self.store.read(lambda tx: jobs.get(tx, job_id))

    def events(self, job_id: str) -> list[JobEvent]:
        return self.store.read(lambda tx: events.after(tx, job_id))

    def words(self, job_id: str) -> list[str]:
        return [event.type for event in self.events(job_id)]

    def claim(self, worker_id: str = "w1", **over: Any) -> jobs.Claimed | None:
        self._claims += 1
        ask = new_ask(worker_id, f"claim-{self._claims}", **over)
        return self.write(lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE))

    def beat(self, job_id: str, fence: int, worker_id: str = "w1") -> Orders:
        return self.write(
            lambda tx: jobs.heartbeat(tx, job_id, fence, worker_id, lease_seconds=LEASE)
        )

    def say(self, job_id: str, fence: int, *said: dict[str, Any], first_n: int = 1) -> int:
        batch = [NumberedEvent(n=n, event=event) for n, event in enumerate(said, first_n)]
        return self.write(lambda tx: events.append(tx, job_id, fence, "w1", batch))

    def finish(self, job_id: str, fence: int, outcome: Outcome, **over: Any) -> Job:
        over = {"promote": lambda job: job.output_dir, **over}
        return self.write(lambda tx: jobs.finish(tx, job_id, fence, outcome, **over))

    def stop(self, job_id: str, mode: StopMode = StopMode.CANCEL, grace_seconds: float = 30) -> Job:
        return self.write(lambda tx: jobs.request_stop(tx, job_id, mode, grace_seconds))

    def reap(self, **over: Any) -> list[Job]:
        return self.write(lambda tx: jobs.reap(tx, **over))

    def start(self, **over: Any) -> Job:
        """A job that runs, as attempt 1 of worker w1."""
        job = self.submit(**over)
        claimed = self.claim()
        assert claimed is not None
        assert claimed.job.id == job.id
        self.beat(job.id, 1)
        return self.get(job.id)


def new_job(**over: Any) -> NewJob:
    values: dict[str, Any] = {
        "owner": "소유자",
        "spec": Sft(model="base", dataset="data/한국어.jsonl"),
        "model": Source(name="base", path="/ws/base"),
        "dataset": Source(name="data/한국어.jsonl", path="/ws/data/한국어.jsonl", sha256=SHA),
        "is_validated": True,
        **over,
    }
    return NewJob(**values)


def new_ask(worker_id: str = "w1", claim_id: str = "c1", **over: Any) -> WorkAsk:
    size = {"slots": 100, "memory_bytes": 1 << 34, "max_slots": 100, "max_memory_bytes": 1 << 34}
    names = set(Capacity.model_fields)
    capacity = Capacity(**{**size, **{name: over.pop(name) for name in names & set(over)}})
    return WorkAsk(worker_id=worker_id, claim_id=claim_id, capacity=capacity, **over)


def started(**over: Any) -> dict[str, Any]:
    return {
        "type": "started",
        "pid": 7,
        "plan": PLAN,
        "total_steps": 10,
        "parameters": 100,
        "trainable_parameters": 10,
        **over,
    }


def step(number: int, **over: Any) -> dict[str, Any]:
    return {
        "type": "step",
        "step": number,
        "total_steps": 10,
        "epoch": number / 10,
        "loss": 2.0 / number,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100,
        "label_tokens": 50,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 1 << 20,
        "eta_seconds": 10.0 - number,
        **over,
    }


def checkpointed(number: int, fence: int = 1) -> dict[str, Any]:
    return {
        "type": "checkpointed",
        "step": number,
        "path": f"/ws/attempts/{fence}/checkpoints/step-{number}",
        "manifest_sha256": SHA,
        "size_bytes": 1000,
    }


def succeeded(number: int = 10) -> Outcome:
    return Outcome(kind="succeeded", step=number, artifact="/ws/artifact", manifest_sha256=SHA)


def failed(failure_class: FailureClass = FailureClass.SIGNAL) -> Outcome:
    return Outcome(kind="failed", failure_class=failure_class, message="💥 실패")


def settle(futures: list[Any]) -> None:
    wait(futures, timeout=60)


@pytest.fixture(scope="session")
def fresh_database(postgres: Postgres) -> Callable[[], str]:
    """Makes a database with today's schema: copied from one, which is quicker than to migrate."""
    pattern = make_url(postgres.database())
    Store.open(pattern.render_as_string()).close()
    numbers = count(1)

    def make() -> str:
        name = f"{pattern.database}_{next(numbers)}"
        with postgres.connect() as connection:
            connection.execute(f"create database {name} template {pattern.database}")
        return pattern.set(database=name).render_as_string()

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/.tunesmith/db.sqlite"
    return str(request.getfixturevalue("fresh_database")())


@pytest.fixture
def ledger(tmp_path: Path, database_url: str) -> Iterator[Ledger]:
    made = Ledger(tmp_path, database_url)
    yield made
    made.store.close()


@pytest.fixture
def sqlite_ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path)
    yield made
    made.store.close()

"""Any order of what clients, workers and time can do keeps the promises of a job."""

import atexit
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.engine import Connection

from store_fixtures import LEASE, Ledger, checkpointed, failed, new_ask, started, succeeded
from tunesmith.errors import ConflictError, FailureClass, FencedError
from tunesmith.spec.hands import NumberedEvent
from tunesmith.spec.records import Job, Outcome, StopMode
from tunesmith.store import events, jobs, tables

WORKERS = st.sampled_from(["w1", "w2"])
FINAL = {"succeeded", "failed", "cancelled"}


@lru_cache(maxsize=1)
def _ledger() -> Ledger:
    """One for all examples: it is emptied in between, which is quicker than to migrate anew."""
    ledger = Ledger(Path(), "sqlite://")
    atexit.register(ledger.store.close)
    return ledger


def empty(tx: Connection) -> None:
    for table in reversed(tables.metadata.sorted_tables):
        if table is not tables.commits:
            tx.execute(table.delete())


class History(RuleBasedStateMachine):
    """The checker looks at rows and events only, never at the guards that it judges."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        super().__init__()
        self.ledger = ledger or _ledger()
        self.ledger.write(empty)
        self.made: list[str] = []
        self.held: list[tuple[str, int, str]] = []
        self.promoted: list[str] = []
        self.final: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.claims = 0

    @precondition(lambda self: len(self.made) < 3)
    @rule(priority=st.integers(0, 1), is_validated=st.booleans())
    def submit(self, priority: int, is_validated: bool) -> None:
        job = self.ledger.submit(priority=priority, is_validated=is_validated)
        self.made.append(job.id)

    @rule(worker_id=WORKERS)
    def claim(self, worker_id: str) -> None:
        self.claims += 1
        ask = new_ask(worker_id, f"m{self.claims}", slots=1, max_slots=2)
        work = lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE)  # noqa: E731
        claimed = self.ledger.write(work)
        again = self.ledger.write(work)
        if claimed is None:
            return
        assert again is not None
        assert (again.fence, again.token) == (claimed.fence, claimed.token)
        assert claimed.job.id not in self.final
        assert claimed.job.is_validated
        assert all(
            fence < claimed.fence for job_id, fence, _ in self.held if job_id == claimed.job.id
        )
        self.held.append((claimed.job.id, claimed.fence, worker_id))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def beat(self, data: Any) -> None:
        job_id, fence, worker_id = data.draw(st.sampled_from(self.held))
        try:
            self.ledger.beat(job_id, fence, worker_id)
        except FencedError:
            return
        self.check_owner(job_id, fence)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), step=st.integers(1, 5))
    def say(self, data: Any, step: int) -> None:
        job_id, fence, worker_id = data.draw(st.sampled_from(self.held))
        batch = [
            NumberedEvent(n=1, event=started()),
            NumberedEvent(n=2, event=checkpointed(step, fence)),
        ]
        try:
            self.ledger.write(lambda tx: events.append(tx, job_id, fence, worker_id, batch))
        except FencedError:
            return
        self.check_owner(job_id, fence)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(
            [
                succeeded(),
                Outcome(kind="stopped", step=1),
                failed(),
                failed(FailureClass.NAN_LOSS),
            ]
        ),
    )
    def finish(self, data: Any, outcome: Outcome) -> None:
        job_id, fence, _ = data.draw(st.sampled_from(self.held))

        def promote(job: Job) -> str:
            self.promoted.append(job.id)
            return job.output_dir

        newest = max(one for job, one, _ in self.held if job == job_id)
        try:
            self.ledger.finish(job_id, fence, outcome, promote=promote)
        except FencedError:
            return
        self.ledger.finish(job_id, fence, outcome, promote=promote)
        assert fence == newest or self.words(job_id).count("claimed") > fence

    @precondition(lambda self: self.made)
    @rule(data=st.data(), mode=st.sampled_from(list(StopMode)))
    def stop(self, data: Any, mode: StopMode) -> None:
        job_id = data.draw(st.sampled_from(self.made))
        try:
            self.ledger.stop(job_id, mode)
        except ConflictError:
            return
        if mode is not StopMode.PAUSE:
            self.cancelled.add(job_id)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        job_id = data.draw(st.sampled_from(self.made))
        try:
            self.ledger.write(lambda tx: jobs.resume(tx, job_id))
        except ConflictError:
            return

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def validate(self, data: Any) -> None:
        job_id = data.draw(st.sampled_from(self.made))
        self.ledger.write(lambda tx: jobs.mark_validated(tx, job_id, {}))

    @rule(seconds=st.sampled_from([0.5, 5.0, LEASE / 2, LEASE * 2]))
    def wait(self, seconds: float) -> None:
        self.ledger.clock.pass_by(seconds)

    @rule()
    def reap(self) -> None:
        self.ledger.reap()

    def words(self, job_id: str) -> list[str]:
        return self.ledger.words(job_id)

    def check_owner(self, job_id: str, fence: int) -> None:
        """Only the newest attempt of an unfinished job may write."""
        assert fence == max(one for job, one, _ in self.held if job == job_id)
        assert job_id not in self.final

    @invariant()
    def promises(self) -> None:
        for job_id in self.made:
            job = self.ledger.get(job_id)
            told = self.ledger.events(job_id)
            assert [event.seq for event in told] == list(range(1, job.last_seq + 1))
            assert [event.fence for event in told] == sorted(event.fence for event in told)
            ends = [event.type for event in told if event.type in FINAL]
            assert ends == ([job.state.value] if job.state.is_final else [])
            assert not ends or told[-1].type in FINAL
            assert [event.type for event in told].count("claimed") == job.attempts == job.fence
            assert self.final.setdefault(job_id, job.state) == job.state or not ends
            assert self.promoted.count(job_id) == (job.state == "succeeded")
            if job_id in self.cancelled:
                assert job.state in {"stopping", "cancelled"}
            assert (job.lease_until is not None) == (
                job.state in {"starting", "running", "stopping"}
            )
            if not job.state.is_final:
                del self.final[job_id]


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


def test_histories_on_postgresql_are_as_whole(
    tmp_path: Path, fresh_database: Callable[[], str]
) -> None:
    ledger = Ledger(tmp_path, fresh_database())
    run_state_machine_as_test(
        lambda: History(ledger),  # type: ignore[arg-type]
        settings=settings(TestHistory.settings, max_examples=10),
    )
    ledger.store.close()

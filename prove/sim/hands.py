"""A worker: it asks for work, reports, delivers ends; what it sends may be late or lost."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlalchemy.engine import Connection

from prove.sim.network import Answer, Line, Network
from prove.sim.oracle import Attempt
from prove.sim.stage import BACKOFF, LEASE, MAX_LAPSES, Stage
from prove.sim.trainer import Run
from tunesmith.errors import FencedError
from tunesmith.spec.hands import Capacity, NumberedEvent, Orders, WorkAsk
from tunesmith.spec.records import Job, JobState, Outcome
from tunesmith.store import claims, events, jobs

SLOTS, MEMORY = 2, 8 << 30
Batch = tuple[NumberedEvent, ...]


@dataclass
class Registry:
    """Every attempt that was ever given out."""

    attempts: dict[int, Attempt] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)
    """Serials whose end was taken."""
    marks: int = 0


@dataclass
class Worker:
    id: str
    gpus: tuple[int, ...]
    stage: Stage
    network: Network
    registry: Registry
    line: Line = field(default_factory=Line)
    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    _claim_number: int = 0

    def act(self) -> None:
        if self.line.frozen_until > self.stage.clock.now:
            return None
        if not self.runs or self.stage.chance(0.3):
            return self.ask()
        run = self.stage.random.choice(list(self.runs.values()))
        self.train(run)
        if self.stage.chance(0.6):
            self.report(run)
        return None

    def suffer(self) -> None:
        """Frozen, cut off, or gone: then only what had ended is left, on its disk."""
        until = self.stage.clock.now + self.stage.random.choice((20, 90, 250))
        choice = self.stage.random.random()
        if choice < 0.35:
            self.line.frozen_until = until
        elif choice < 0.7:
            self.line.cut_until = until
        else:
            self.line.boot += 1
            self._claim_number += 1
            self.line.frozen_until = self.stage.clock.now + self.stage.random.choice((1, 30))
            is_kept = self.stage.chance(0.7)
            kept = {key: run for key, run in self.runs.items() if is_kept and run.outcome}
            self.runs = kept

    def train(self, run: Run) -> None:
        self.registry.marks += 1
        run.train(self.stage, self.registry.marks, self.network.is_calm)

    # claims

    def ask(self) -> None:
        """Where the answer to a claim was lost, it is asked again under the same id."""
        ask = self._question()
        held = [run.attempt for run in self.runs.values()]

        def request() -> Answer | None:
            self.network.server.greet(self.id, int(ask.boot_id), held)
            return self._claim(ask)

        self.network.send(self.line, request)

    def _question(self) -> WorkAsk:
        busy = [run.attempt for run in self.runs.values()]
        taken = {gpu for attempt in busy for gpu in attempt.gpus}
        capacity = Capacity(
            slots=max(0, SLOTS - sum(not attempt.gpus for attempt in busy)),
            gpus=tuple(gpu for gpu in self.gpus if gpu not in taken),
            memory_bytes=MEMORY,
            max_slots=SLOTS,
            max_gpus=len(self.gpus),
            max_memory_bytes=MEMORY,
        )
        return WorkAsk(
            worker_id=self.id,
            claim_id=f"{self.line.boot}-{self._claim_number}",
            capacity=capacity,
            boot_id=str(self.line.boot),
        )

    def _claim(self, ask: WorkAsk) -> Answer | None:
        waiting = list(self._might_get(ask))
        known = self.stage.oracle.claims.get((ask.worker_id, ask.claim_id))
        if not waiting and known is None and self.stage.chance(0.6):
            return None
        given: list[Run] = []

        def told(claimed: jobs.Claimed | None) -> None:
            if claimed is not None:
                given.append(self._run_of(ask, claimed, known, waiting))

        if self.stage.floor.read(lambda tx: jobs.may_claim(tx, ask)):
            self.stage.do("claim", lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE), told)

        def answer() -> None:
            self._claim_number += 1
            for run in given:
                self.runs.setdefault((run.attempt.job_id, run.attempt.fence), run)

        return answer

    def _run_of(
        self,
        ask: WorkAsk,
        claimed: jobs.Claimed,
        known: int | None,
        waiting: list[tuple[str, int, int]],
    ) -> Run:
        oracle, job = self.stage.oracle, claimed.job
        attempt = self.registry.attempts.get(known or -1)
        if attempt is None or (attempt.job_id, attempt.fence) != (job.id, claimed.fence):
            attempt = self._new_attempt(ask, claimed)
            oracle.claimed(attempt)
            oracle.first_in_line(job.id, waiting)
            oracle.check_room(self.id, SLOTS, MEMORY)
        offered = [(row.path, row.step) for row in claimed.checkpoints]
        oracle.resumes_from(job.id, offered)
        return Run(attempt, claimed.first_event_n, at_step=offered[0][1] if offered else 0)

    def _new_attempt(self, ask: WorkAsk, claimed: jobs.Claimed) -> Attempt:
        known = self.registry.attempts
        attempt = Attempt(
            len(known) + 1,
            claimed.job.id,
            claimed.fence,
            claimed.token,
            self.id,
            int(ask.boot_id),
            claimed.gpus,
            claimed.first_event_n,
            ask.claim_id,
            0 if claimed.gpus else claimed.job.needs.memory_bytes,
        )
        if any(attempt.token == other.token for other in known.values()):
            self.stage.oracle.fault(f"{attempt.job_id}: two attempts share a token")
        known[attempt.serial] = attempt
        return attempt

    def _might_get(self, ask: WorkAsk) -> Iterator[tuple[str, int, int]]:
        """Id, priority and number of every job that waits and would fit, by the oracle's books."""
        mine = [one for one in self.stage.oracle.live.values() if one.worker_id == self.id]
        on_cpu = [one for one in mine if not one.gpus]
        slots = min(ask.capacity.slots, SLOTS - len(on_cpu))
        memory = MEMORY - sum(one.memory_bytes for one in on_cpu)
        taken = {gpu for one in mine for gpu in one.gpus}
        gpus = sum(gpu not in taken for gpu in ask.capacity.gpus)
        for job_id, book in self.stage.oracle.books.items():
            is_due = book.is_valid and book.due <= self.stage.clock.now
            fits = slots > 0 and book.memory_bytes <= memory
            if book.needs_gpus:
                fits = book.needs_gpus <= gpus
            if book.state == "queued" and is_due and fits:
                yield job_id, book.priority, book.number

    # reports

    def report(self, run: Run) -> None:
        """Heartbeat and words; the end, once every word is stored."""
        if run.outcome is not None and not run.spool:
            return self.network.send(self.line, lambda: self._finish(run))
        has_gap = not self.network.is_calm and self.stage.chance(0.1)
        batch = tuple(run.spool[1:] if has_gap else run.spool)
        if batch and not self.network.is_calm and self.stage.chance(0.1):
            return self.network.send(self.line, lambda: self._take_words(run, batch))
        return self.network.send(self.line, lambda: self._take(run, batch))

    def _take(self, run: Run, batch: Batch) -> Answer | None:
        """A report at the server."""
        attempt, oracle = run.attempt, self.stage.oracle
        orders: list[Orders] = []

        def work(tx: Connection) -> Orders:
            claims.check_token(tx, attempt.job_id, attempt.fence, attempt.token)
            if batch:
                events.append(tx, attempt.job_id, attempt.fence, self.id, batch)
            return claims.heartbeat(tx, attempt.job_id, attempt.fence, self.id, lease_seconds=LEASE)

        def told(answer: Orders) -> None:
            orders.append(answer)
            oracle.beaten(attempt)
            oracle.check_room(self.id, SLOTS, MEMORY)
            self._acknowledge(run, answer.accepted_n)
            asked = oracle.books[attempt.job_id].stop_asked
            if asked != (answer.stop.value if answer.stop else None):
                oracle.fault(f"{attempt.job_id}: asked to {asked}, ordered to {answer.stop}")

        if not self.stage.do("report", work, told, may=(FencedError,)):
            oracle.refused(attempt, "a report")
            return lambda: self._drop(run)

        def answer() -> None:
            run.forget(orders[0].accepted_n)
            run.stop = orders[0].stop or run.stop
            run.is_stubborn = run.is_stubborn or self.stage.chance(0.05)

        return answer

    def _take_words(self, run: Run, batch: Batch) -> Answer | None:
        """Words without a heartbeat: they are guarded by themselves."""
        attempt, taken = run.attempt, list[int]()

        def told(last_n: int) -> None:
            taken.append(last_n)
            if any(n <= last_n for n in run.words):  # else nothing was written
                self.stage.oracle.accepted(attempt, "words")
            self._acknowledge(run, last_n)

        if not self.stage.do(
            "report",
            lambda tx: events.append(tx, attempt.job_id, attempt.fence, self.id, batch),
            told,
            may=(FencedError,),
        ):
            self.stage.oracle.refused(attempt, "words")
            return lambda: self._drop(run)
        return lambda: run.forget(taken[0])

    def _acknowledge(self, run: Run, last_n: int) -> None:
        """Every word up to this number was said to be stored."""
        for n in [n for n in run.words if n <= last_n]:
            self.stage.oracle.acknowledged(run.attempt, run.words.pop(n))

    # ends

    def _finish(self, run: Run) -> Answer | None:
        attempt, outcome = run.attempt, run.outcome
        assert outcome is not None
        is_first = attempt.serial not in self.registry.over
        moved: list[str] = []

        def promote(job: Job) -> str:
            moved.append(job.id)
            return job.output_dir

        # The server makes nothing ready where the job has ended before it looks.
        has_ended = self.stage.floor.read(lambda tx: jobs.get(tx, attempt.job_id)).state.is_final

        def work(tx: Connection) -> Job:
            claims.check_token(tx, attempt.job_id, attempt.fence, attempt.token)
            return jobs.finish(
                tx,
                attempt.job_id,
                attempt.fence,
                outcome,
                promote=None if has_ended else promote,
                max_lapses=MAX_LAPSES,
                backoff_seconds=BACKOFF,
            )

        def told(job: Job) -> None:
            if is_first:
                self.registry.over.add(attempt.serial)
                self._ended(attempt, outcome, job, bool(moved))

        if not self.stage.do("finish", work, told, may=(FencedError,)):
            self._refused_end(attempt, is_first, bool(moved))
        return lambda: self._drop(run)

    def _ended(self, attempt: Attempt, outcome: Outcome, job: Job, is_moved: bool) -> None:
        if is_moved:
            self.stage.oracle.promoted(job.id, attempt.serial)
        is_retryable = outcome.failure_class is not None and outcome.failure_class.is_retryable
        is_again = outcome.kind == "failed" and job.state is JobState.QUEUED
        is_lapse = is_again or (is_retryable and job.state is JobState.FAILED)
        self.stage.oracle.ended(attempt, outcome.kind, job.state.value, is_lapse)

    def _refused_end(self, attempt: Attempt, is_first: bool, is_moved: bool) -> None:
        self.stage.oracle.refused(attempt, "an end")
        if not is_first:
            self.stage.oracle.fault(f"{attempt.job_id}: its end, told again, was refused")
        if is_moved:
            self.stage.oracle.fault(f"{attempt.job_id}: promoted, and then refused")

    def _drop(self, run: Run) -> None:
        self.runs.pop((run.attempt.job_id, run.attempt.fence), None)

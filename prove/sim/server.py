"""The server: it reaps, checks data, greets workers, and is away now and then."""

from sqlalchemy.engine import Connection

from prove.sim.oracle import Attempt
from prove.sim.stage import BACKOFF, LEASE, MAX_LAPSES, Stage
from tunesmith.errors import FailureClass
from tunesmith.spec.records import Job
from tunesmith.store import endings, jobs


class Server:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._down_until = 0.0
        self._boots: dict[str, int] = {}

    def act(self) -> None:
        if self.is_down:
            return
        acts = (self.reap, self.reap, self.validate, self._leave)
        self.stage.random.choice(acts)()

    @property
    def is_down(self) -> bool:
        """Back, it has forgotten what it only remembered, and gives workers time to return."""
        if self._down_until and self.stage.clock.now >= self._down_until:
            self._down_until = 0.0
            self._boots.clear()
            self.stage.do("grace", lambda tx: jobs.grant_grace(tx, LEASE))
            self.stage.oracle.grace()
        return self._down_until > 0

    def come_back(self) -> None:
        self._down_until = min(self._down_until, self.stage.clock.now)

    def _leave(self) -> None:
        if self.stage.chance(0.3):
            self._down_until = self.stage.clock.now + self.stage.random.choice((1, 10, 100))

    def reap(self) -> None:
        def told(taken: list[Job]) -> None:
            for job in taken:
                self.stage.oracle.taken_back(job.id, job.state.value, endings.OVERDUE_SECONDS)

        self.stage.do(
            "reap",
            lambda tx: jobs.reap(tx, max_lapses=MAX_LAPSES, backoff_seconds=BACKOFF),
            told,
        )

    def validate(self, is_good: bool = False) -> None:
        for job in self.stage.floor.read(jobs.to_validate):
            if is_good or self.stage.chance(0.8):
                self._mark_valid(job.id)
            else:
                self._refuse(job.id)

    def _mark_valid(self, job_id: str) -> None:
        self.stage.do("validate", lambda tx: jobs.mark_validated(tx, job_id, {}))
        self.stage.oracle.books[job_id].is_valid = True

    def _refuse(self, job_id: str) -> None:
        def work(tx: Connection) -> Job:
            return jobs.fail_queued(tx, job_id, FailureClass.DATA_ERROR, "행 3")

        self.stage.do("validate", work)

    def greet(self, worker_id: str, boot: int, held: list[Attempt]) -> None:
        """A worker that was started anew has lost what it does not hold."""
        if self._boots.get(worker_id) == boot:
            return
        kept = {(attempt.job_id, attempt.fence) for attempt in held}
        serials = {attempt.serial for attempt in held}

        def told(lost: list[Job]) -> None:
            for job in lost:
                self.stage.oracle.forgotten(job.id, job.state.value, worker_id, serials)

        self.stage.do(
            "forget",
            lambda tx: jobs.forget_boot(
                tx, worker_id, kept, max_lapses=MAX_LAPSES, backoff_seconds=0.1
            ),
            told,
        )
        self._boots[worker_id] = boot

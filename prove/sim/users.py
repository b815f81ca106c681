"""Users: they submit, sometimes twice with one key, and cancel, pause and resume as they please."""

from sqlalchemy.engine import Connection

from prove.sim.oracle import FINAL, Book
from prove.sim.stage import Stage
from store_fixtures import SHA, new_job
from tunesmith.errors import ConflictError, RateLimitError
from tunesmith.spec.records import Job, Needs, NewJob, StopMode
from tunesmith.store import idempotency, jobs

MAX_JOBS, MAX_UNFINISHED = 6, 3
OWNERS = ("가", "b")
FOLDERS = (None, None, "/ws/a", "/ws/b", "/ws/a/inner")


class Users:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._keys: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def act(self) -> None:
        known, random = list(self.stage.oracle.books), self.stage.random
        if len(known) < MAX_JOBS and (not known or self.stage.chance(0.5)):
            return self._submit()
        job_id, choice = random.choice(known), random.random()
        if choice < 0.45:
            return self._stop(job_id, random.choice(list(StopMode)))
        if choice < 0.75:
            return self.resume(job_id)
        if choice < 0.9:
            self.stage.do("stop", lambda tx: jobs.request_checkpoint(tx, job_id))
            return None
        return self._submit()

    def _submit(self) -> None:
        """Now and then with a key that was used before: the same job comes back."""
        random = self.stage.random
        is_again = bool(self._keys) and self.stage.chance(0.2)
        key = random.choice(list(self._keys)) if is_again else f"key-{random.getrandbits(64):x}"
        new = self._new()

        def work(tx: Connection) -> tuple[Job, bool]:
            kept = idempotency.find(tx, "all", "/train", key, SHA)
            if kept is not None:
                return jobs.get(tx, kept.response["job_id"]), False
            job = jobs.submit(tx, new, max_unfinished=MAX_UNFINISHED, outputs_root="/ws/outputs")
            answer = idempotency.Stored(status=200, response={"job_id": job.id})
            idempotency.keep(tx, "all", "/train", key, SHA, answer)
            return job, True

        def told(answer: tuple[Job, bool]) -> None:
            job, is_new = answer
            if self._keys.get(key, job.id) != job.id:
                self.stage.oracle.fault(f"one key, two jobs: {self._keys[key]} and {job.id}")
            if is_new:
                self._accept(new, job)
                self._keys[key] = job.id

        self.stage.do("submit", work, told, may=(RateLimitError, ConflictError))

    def _new(self) -> NewJob:
        random = self.stage.random
        on_gpu = Needs(gpus=random.choice((1, 2)), memory_bytes=1 << 30)
        on_cpu = Needs(memory_bytes=random.choice((1, 3, 5)) << 30)
        return new_job(
            owner=random.choice(OWNERS),
            priority=random.choice((0, 0, 0, 5, -5)),
            is_validated=self.stage.chance(0.8),
            needs=on_gpu if self.stage.chance(0.3) else on_cpu,
            output_dir=random.choice(FOLDERS),
        )

    def _accept(self, new: NewJob, job: Job) -> None:
        oracle = self.stage.oracle
        mine = [book for book in oracle.books.values() if book.owner == new.owner]
        if sum(book.state not in FINAL for book in mine) >= MAX_UNFINISHED:
            oracle.fault(f"{job.id}: accepted over the quota")
        for other, folder in self._folders.items():
            if oracle.books[other].state not in FINAL and _overlap(folder, job.output_dir):
                oracle.fault(f"{job.id} and {other} write to one folder")
        book = Book(
            new.owner,
            new.priority,
            len(oracle.books),
            new.needs.gpus,
            new.needs.memory_bytes,
            is_valid=new.is_validated,
        )
        oracle.submitted(book, job.id)
        self._folders[job.id] = job.output_dir

    def _stop(self, job_id: str, mode: StopMode) -> None:
        oracle, grace = self.stage.oracle, self.stage.random.choice((0.0, 20.0))
        book = oracle.books[job_id]
        if book.state in FINAL and self.stage.chance(0.7):
            return
        had_ended = book.state in FINAL

        def told(job: Job) -> None:
            if had_ended:
                oracle.fault(f"{job_id}: a stop of an ended job was acknowledged")
            if job.stop_mode is not None and book.stop_asked != job.stop_mode.value:
                wait = 0.0 if job.stop_mode is StopMode.FORCE else grace
                oracle.stop_told(job_id, job.stop_mode.value, wait)

        self.stage.do(
            "stop",
            lambda tx: jobs.request_stop(tx, job_id, mode, grace),
            told,
            may=(ConflictError,),
        )

    def resume(self, job_id: str) -> None:
        book = self.stage.oracle.books[job_id]

        def told(job: Job) -> None:
            book.in_vain, book.due, book.was_lapsed = 0, 0.0, False

        self.stage.do("resume", lambda tx: jobs.resume(tx, job_id), told, may=(ConflictError,))


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")

"""Submissions on their way to the writer: those that wait at the same time are written as one.

A job costs a handful of statements, and so do a hundred jobs. Where one of them can't be taken they
are written one by one, each with its own answer.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith.errors import ConflictError
from tunesmith.spec.records import Job, NewJob
from tunesmith.store import idempotency, jobs, mirrors
from tunesmith.store.prepared import MOST_ROWS

if TYPE_CHECKING:
    from tunesmith.hub import Hub


class Taken(ConflictError):
    """The request's Idempotency-Key has its answer already."""


@dataclass(frozen=True)
class Key:
    """An Idempotency-Key, and what it stands for."""

    owner: str
    route: str
    text: str
    body_sha256: str


@dataclass(frozen=True)
class Submission:
    new: NewJob
    key: Key | None = None


_Waiting = tuple[Submission, "asyncio.Future[Job]"]


class Intake:
    """Used in the server's loop; what it writes runs on the writer's thread."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._most = hub.settings.max_queued_jobs
        self._outputs = hub.workspace / "outputs"
        self._waiting: deque[_Waiting] = deque()
        self._is_asked = False
        """Whether a piece of work is on its way that will take what waits."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, submission: Submission) -> Job:
        """Durable once it returns. Raises what `store.jobs.submit` does, Taken, NoSpaceError."""
        if submission.new.output_dir is not None:  # it may be in another's way
            return await self._take_one(submission)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Job] = loop.create_future()
        self._waiting.append((submission, answer))
        if not self._is_asked:
            self._is_asked = True
            loop.call_soon(self._start)  # after the requests that came in with this one
        return await answer

    def _start(self) -> None:
        task = asyncio.create_task(self._write())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self) -> None:
        """Whatever waits when the writer comes to it."""
        batch: list[_Waiting] = []

        def work(tx: Connection) -> list[Job]:
            if not batch:  # else it is run again, for the same ones
                self._is_asked = False
                batch.extend(self._next_ones())
            return self._submit_many(tx, [submission for submission, _ in batch])

        try:
            made = await self._hub.write(work, is_new=True)
        except jobs.OneByOne:
            await asyncio.gather(*(self._answer_one(*one) for one in batch))
        except Exception as error:  # whatever it is: it is the answer of them all
            self._is_asked = False
            for _, answer in batch or self._next_ones():
                if not answer.done():
                    answer.set_exception(error)
        else:
            for (_, answer), job in zip(batch, made, strict=True):
                if not answer.done():
                    answer.set_result(job)
        if self._waiting and not self._is_asked:
            self._is_asked = True
            self._start()

    def _next_ones(self) -> list[_Waiting]:
        """Also called on the writer's thread. Those that nobody waits for any more are left out."""
        found: list[_Waiting] = []
        while self._waiting and len(found) < MOST_ROWS:
            one = self._waiting.popleft()
            if not one[1].cancelled():
                found.append(one)
        return found

    def _submit_many(self, tx: Connection, batch: Sequence[Submission]) -> list[Job]:
        if not batch:
            return []
        made = jobs.submit_many(
            tx, [one.new for one in batch], max_unfinished=self._most, outputs_root=self._outputs
        )
        keys = [_row(one.key, job) for one, job in zip(batch, made, strict=True) if one.key]
        if keys and not idempotency.keep_many(tx, keys):
            raise jobs.OneByOne
        self._owe(tx, made)
        return made

    async def _answer_one(self, submission: Submission, answer: "asyncio.Future[Job]") -> None:
        try:
            job = await self._take_one(submission)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(job)

    async def _take_one(self, submission: Submission) -> Job:
        return await self._hub.write(lambda tx: self._submit(tx, submission), is_new=True)

    def _submit(self, tx: Connection, submission: Submission) -> Job:
        job = jobs.submit(tx, submission.new, max_unfinished=self._most, outputs_root=self._outputs)
        key = submission.key
        if key is not None and not idempotency.keep_many(tx, [_row(key, job)]):
            raise Taken("this Idempotency-Key is in use; try again")
        self._owe(tx, [job])
        return job

    def _owe(self, tx: Connection, made: Sequence[Job]) -> None:
        if self._hub.settings.mlflow_url:
            for job in made:
                mirrors.owe(tx, job.id)


def _row(key: Key, job: Job) -> dict[str, object]:
    answer = idempotency.Stored(status=200, response={"job_id": job.id})
    return idempotency.row(key.owner, key.route, key.text, key.body_sha256, answer)

"""One trainer, watched: started, heard, ended where it is told to or says nothing, and its end."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tunesmith.errors import FailureClass
from tunesmith.spec.pipe import Failed, Finished, Notice, Stopped, TrainerEvent
from tunesmith.spec.records import Outcome
from tunesmith.work import memory
from tunesmith.work.fork import Child, Forker
from tunesmith.work.lighter import Lighter
from tunesmith.work.pump import Log, pump

log = logging.getLogger(__name__)
T = TypeVar("T")
_event: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)

MAX_EVENT_BYTES = 65_536
"""Of one line; a longer one is left out, and a notice says so."""
DUMP_SECONDS = 2.0
"""For a stalled trainer to write its stacks down."""
MAX_COMPLAINTS = 10
"""Lines that are no events are told of so often; a trainer that babbles fills no disk."""
Hear = Callable[[TrainerEvent, int], None]


class Trainer:
    """Of one attempt, also before there is a process. `hear` gets its events, with their bytes."""

    def __init__(self, job_id: str, stall_seconds: float, leave_seconds: float, hear: Hear) -> None:
        """`leave_seconds`: from its last word, or the end of its pipe, until it is killed."""
        self._job_id, self._hear_event = job_id, hear
        self._stall_seconds, self._leave_seconds = stall_seconds, leave_seconds
        self.halt = asyncio.Event()
        """Set once it should end."""
        self.child: Child | None = None
        self._stop_at: float | None = None
        self._ending: Outcome | None = None
        self._has_stalled = False
        self._complaints = 0
        self._oversized = 0
        """Lines over the limit so far."""
        self._last_word = time.monotonic()
        self._memory = memory.Watch()
        self._lighter = Lighter()

    def stop(self, seconds: float) -> None:
        """Ask for a checkpoint and an end; the session is killed after `seconds`."""
        deadline = time.monotonic() + seconds
        self._stop_at = deadline if self._stop_at is None else min(self._stop_at, deadline)
        if not self.halt.is_set() and seconds > 0:
            self.signal(signal.SIGTERM)
        self.halt.set()

    def kill(self) -> None:
        """Nothing of it is wanted any more."""
        self._stop_at = 0.0
        self.halt.set()
        if self.child is not None:
            self.child.kill()

    def signal(self, number: signal.Signals) -> None:
        if self.child is not None:
            self.child.signal(number)

    async def unless_halted(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Wait for it, but for no longer than the trainer is wanted."""
        working = asyncio.create_task(work)
        halted = asyncio.create_task(self.halt.wait())
        try:
            await asyncio.wait([working, halted], return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            for task in (working, halted):
                task.cancel()
            await asyncio.gather(working, halted, return_exceptions=True)

    async def run(
        self,
        forker: Forker,
        program: tuple[str, list[str]],
        environment: Mapping[str, str],
        task: bytes,
        journal: Log,
    ) -> Outcome:
        """From its start, with module and arguments, to what came of it. Raises OSError."""
        child = self.child = await forker.start(*program, dict(environment))
        self._last_word = time.monotonic()
        self._memory = memory.Watch()
        reading = asyncio.create_task(self._read(child))
        logging_task = asyncio.create_task(pump(child.stderr, journal))
        watching = asyncio.create_task(self._watch(child, reading))
        try:
            await child.hand_over(task)
            if self.halt.is_set():
                child.signal(signal.SIGTERM)
            status = await asyncio.shield(child.exited)
            child.kill()
            await asyncio.wait([reading, logging_task], timeout=5)
        finally:
            child.kill()
            child.close()
            self.child = None
            for helper in (reading, logging_task, watching):
                helper.cancel()
            await asyncio.gather(reading, logging_task, watching, return_exceptions=True)
        return self._outcome(status)

    async def _read(self, child: Child) -> None:
        while True:
            try:
                line = await child.stdout.readline()
            except ValueError:
                self._complain("an event line over the limit was left out")
                continue
            if not line:
                self._last_word = time.monotonic()
                return
            self._hear(line)

    def _hear(self, line: bytes) -> None:
        self._last_word = time.monotonic()
        self._has_stalled = False
        if len(line) > MAX_EVENT_BYTES:
            self._oversized += 1
            if self._oversized <= MAX_COMPLAINTS:
                self._hear_event(_left_out(len(line)), 500)
            return
        try:
            event = _event.validate_json(line)
        except ValidationError:
            self._complain(f"not an event: {line[:200]!r}")
            return
        self._lighter.hear(event)
        ending = _ending_of(event)
        if ending is None:
            self._hear_event(event, len(line))
        else:
            # Where several processes train, the first failure is the cause of the others'.
            self._ending = _first_failure(self._ending, ending)

    def _complain(self, fault: str) -> None:
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            log.warning("job %s: %s", self._job_id, fault)

    async def _watch(self, child: Child, reading: "asyncio.Task[None]") -> None:
        """Kill at the stop's deadline, and a trainer that is silent, or stays after its last word.

        Goes on until the child's end: what was killed once may not have been there yet.
        """
        while True:
            await asyncio.sleep(0.05 if self.halt.is_set() else 0.5)
            if not child.exited.done():
                self._memory.look(child.pid)
            now = time.monotonic()
            silence = now - self._last_word
            has_ended = self._ending is not None or reading.done()
            if self._stop_at is not None and now >= self._stop_at:
                child.kill()
            elif has_ended and silence > self._leave_seconds:
                log.warning("job %s: the trainer did not leave; killed", self._job_id)
                child.kill()
            elif silence > self._stall_seconds:
                await self._end_stall(child)

    async def _end_stall(self, child: Child) -> None:
        """Stacks to the log, then the end, unless that woke it up."""
        self._has_stalled = True
        child.signal(signal.SIGUSR1)
        await asyncio.sleep(DUMP_SECONDS)
        if self._has_stalled:
            child.kill()

    def _outcome(self, status: int) -> Outcome:
        if self._ending is not None:
            return self._ending
        if self.halt.is_set():
            return Outcome(kind="stopped")
        if self._has_stalled:
            told = f"no word from the trainer for {self._stall_seconds:.0f} s; killed"
            return failure(FailureClass.STALLED, told)
        if status == -signal.SIGKILL and self._memory.has_killed():
            for word in self._lighter.words():
                self._hear_event(word, 500)
            return failure(FailureClass.OOM_HOST, self._memory.sentence())
        if status < 0:
            told = f"the trainer was killed by {_signal_name(-status)}"
            return failure(FailureClass.SIGNAL, told)
        told = f"the trainer ended with status {status} and no result"
        return failure(FailureClass.NO_ARTIFACT, told)


def failure(kind: FailureClass, message: str, hint: str = "") -> Outcome:
    return Outcome(kind="failed", failure_class=kind, message=message[:8000], hint=hint)


def _ending_of(event: TrainerEvent) -> Outcome | None:
    match event:
        case Finished():
            return Outcome(
                kind="succeeded",
                step=event.step,
                artifact=event.artifact,
                manifest_sha256=event.manifest_sha256,
            )
        case Stopped():
            return Outcome(kind="stopped", step=event.step)
        case Failed():
            return failure(event.failure_class, event.message, event.hint)
        case _:
            return None


def _first_failure(before: Outcome | None, now: Outcome) -> Outcome:
    return before if before is not None and before.kind == "failed" else now


def _left_out(size: int) -> Notice:
    return Notice(
        level="warning",
        code="bad_event",
        message=f"an event of {size} bytes was left out; {MAX_EVENT_BYTES} is the limit",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

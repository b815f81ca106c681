"""One attempt, supervised: start the trainer, carry its events to the API, obey the orders back."""

import asyncio
import errno
import logging
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tunesmith.errors import FailureClass, FencedError, TuningAPIError
from tunesmith.manifest import BrokenManifest, verify
from tunesmith.spec.hands import Assignment, HeldAttempt, Orders, Report
from tunesmith.spec.pipe import Failed, Finished, Notice, Stopped, TrainerEvent, TrainerTask
from tunesmith.spec.records import Outcome, StopMode
from tunesmith.work.fork import Child, Forker
from tunesmith.work.pump import CappedLog, pump
from tunesmith.work.receipt import Receipt
from tunesmith.work.spool import Spool
from tunesmith.work.wire import Unreachable, Wire

log = logging.getLogger(__name__)
_event: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)

BATCH_SECONDS = 0.5
"""Events wait at most this long for company."""
MAX_EVENT_BYTES = 65_536
"""Of one line; a longer one is left out, and a notice says so."""
DUMP_SECONDS = 2.0
"""For a stalled trainer to write its stacks down."""
MAX_COMPLAINTS = 10
"""Lines that are no events are told of so often; a trainer that babbles fills no disk."""


@dataclass(frozen=True)
class Pace:
    """How often and how long; the operator's settings."""

    heartbeat_seconds: float
    max_log_bytes: int
    leave_seconds: float = 30
    """From a trainer's last word, or the end of its pipe, until its session is killed."""


@dataclass
class Attempt:
    """From an assignment to a delivered outcome. Run it once, with `run()`."""

    job: Assignment
    worker_id: str
    wire: Wire
    forker: Forker
    pace: Pace
    module: str = "tunesmith.train"
    is_delivering: bool = False
    """Whether the trainer has gone and only the API's ear is wanted."""
    _ending: Outcome | None = None
    _is_fenced: bool = False
    _has_stalled: bool = False
    _stop_at: float | None = None
    _complaints: int = 0
    _child: Child | None = None
    _last_word: float = field(default_factory=time.monotonic)
    _halt: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the trainer should end."""
    _said: asyncio.Event = field(default_factory=asyncio.Event)
    _nudged: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._spool = Spool(self.job.first_event_n)

    @property
    def path(self) -> str:
        return f"/attempts/{self.job.job_id}/{self.job.fence}"

    @property
    def held(self) -> HeldAttempt:
        return HeldAttempt(job_id=self.job.job_id, fence=self.job.fence)

    async def run(self) -> None:
        """Never raises for a trainer's fault: every end becomes an outcome that the API is told.

        The lease is kept until the outcome is taken: to read a large artifact takes the API long.
        """
        keeper = asyncio.create_task(self._keep_lease())
        try:
            outcome = await self._end()
            if self._is_fenced:
                log.warning("job %s: attempt %d was fenced", self.job.job_id, self.job.fence)
            else:
                await self._deliver(outcome)
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    def nudge(self) -> None:
        """New orders are waiting: fetch them now."""
        self._nudged.set()

    def stop(self, seconds: float) -> None:
        """Ask for a checkpoint and an end; the session is killed after `seconds`."""
        deadline = time.monotonic() + seconds
        self._stop_at = deadline if self._stop_at is None else min(self._stop_at, deadline)
        if not self._halt.is_set() and self._child is not None and seconds > 0:
            self._child.signal(signal.SIGTERM)
        self._halt.set()

    # the trainer

    async def _end(self) -> Outcome:
        try:
            Path(self.job.attempt_dir).mkdir(parents=True, exist_ok=True)
            return await self._train()
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = FailureClass.DISK_FULL if is_full else FailureClass.INFRA_LOST
            return _failure(kind, f"cannot start: {error}")
        except Exception as error:
            log.exception("job %s: supervising failed", self.job.job_id)
            return _failure(FailureClass.INFRA_LOST, f"the worker failed: {error!r}")

    async def _train(self) -> Outcome:
        task = await self._task()
        journal = CappedLog(Path(self.job.log_path), self.pace.max_log_bytes)
        try:
            await self._forking_or_halt()
            if self._halt.is_set():
                return Outcome(kind="stopped")
            journal.line(f"[attempt {self.job.fence} starts; resumes from {task.resume_from}]")
            return await self._supervise(task, journal)
        finally:
            journal.close()

    async def _task(self) -> TrainerTask:
        resume = await asyncio.to_thread(self._newest_checkpoint)
        return TrainerTask(
            job_id=self.job.job_id,
            fence=self.job.fence,
            spec=self.job.spec,
            inputs=self.job.inputs,
            attempt_dir=self.job.attempt_dir,
            resume_from=resume,
            plan=self.job.plan,
        )

    def _newest_checkpoint(self) -> str | None:
        """The newest accepted checkpoint whose every byte is as its manifest says."""
        for row in self.job.checkpoints:
            if not Path(row.path).exists():  # older ones were cleared away
                continue
            try:
                verify(Path(row.path), row.manifest_sha256)
                return row.path
            except BrokenManifest as error:
                self._say(
                    Notice(
                        level="warning",
                        code="checkpoint_rejected",
                        message=f"step {row.step}: {error}"[:4000],
                        detail={"step": row.step, "fence": row.fence},
                    )
                )
        return self.job.resume_from

    async def _forking_or_halt(self) -> None:
        """Wait for the forking process, but for no longer than the attempt is wanted."""
        waiting = [
            asyncio.create_task(self.forker.wait_ready(30)),
            asyncio.create_task(self._halt.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def _supervise(self, task: TrainerTask, journal: CappedLog) -> Outcome:
        environment = {"OMP_NUM_THREADS": str(self.job.threads)}
        if self.job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.job.gpus))
        child = self._child = await self.forker.start(self.module, [], environment)
        self._last_word = time.monotonic()
        reading = asyncio.create_task(self._read(child))
        logging_task = asyncio.create_task(pump(child.stderr, journal))
        watching = asyncio.create_task(self._watch(child, reading))
        try:
            await child.hand_over(task.model_dump_json().encode())
            if self._halt.is_set():
                child.signal(signal.SIGTERM)
            status = await asyncio.shield(child.exited)
            child.kill()
            await asyncio.wait([reading, logging_task], timeout=5)
        finally:
            child.kill()
            child.close()
            self._child = None
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
            self._say(_left_out(len(line)))
            return
        try:
            event = _event.validate_json(line)
        except ValidationError:
            self._complain(f"not an event: {line[:200]!r}")
            return
        ending = _ending_of(event)
        if ending is None:
            self._say(event, len(line))
        else:
            self._ending = ending

    def _say(self, event: TrainerEvent, size: int = 500) -> None:
        self._spool.add(event.model_dump(mode="json"), size)
        self._said.set()

    def _complain(self, fault: str) -> None:
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            log.warning("job %s: %s", self.job.job_id, fault)

    async def _watch(self, child: Child, reading: "asyncio.Task[None]") -> None:
        """Kill at the stop's deadline, and a trainer that is silent, or stays after its last word.

        Goes on until the child's end: what was killed once may not have been there yet.
        """
        while True:
            await asyncio.sleep(0.05 if self._halt.is_set() else 0.5)
            now = time.monotonic()
            silence = now - self._last_word
            has_ended = self._ending is not None or reading.done()
            if self._is_fenced or (self._stop_at is not None and now >= self._stop_at):
                child.kill()
            elif has_ended and silence > self.pace.leave_seconds:
                log.warning("job %s: the trainer did not leave; killed", self.job.job_id)
                child.kill()
            elif silence > self.job.stall_seconds:
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
        if self._halt.is_set():
            return Outcome(kind="stopped")
        if self._has_stalled:
            told = f"no word from the trainer for {self.job.stall_seconds:.0f} s; killed"
            return _failure(FailureClass.STALLED, told)
        if status < 0:
            told = f"the trainer was killed by {_signal_name(-status)}"
            return _failure(FailureClass.SIGNAL, told)
        told = f"the trainer ended with status {status} and no result"
        return _failure(FailureClass.NO_ARTIFACT, told)

    # the API

    async def _keep_lease(self) -> None:
        """Heartbeats, with what was said; an event waits at most BATCH_SECONDS."""
        while not self._is_fenced:
            self._said.clear()
            self._nudged.clear()
            try:
                is_more_waiting = await self._report()
            except Unreachable:
                await asyncio.sleep(min(2.0, self.pace.heartbeat_seconds))
            except FencedError:
                self._is_fenced = True
                self._halt.set()
                if self._child is not None:
                    self._child.kill()
            except TuningAPIError as error:
                self._complain(f"the API refused a report: {error}")
                await asyncio.sleep(self.pace.heartbeat_seconds)
            else:
                if not is_more_waiting:
                    await self._pause()

    async def _pause(self) -> None:
        """Until a heartbeat is due, or something was said and has waited for company."""
        if not self._nudged.is_set():
            await _first_of(self._said, self._nudged, seconds=self.pace.heartbeat_seconds)
        if not self._nudged.is_set():
            await _first_of(self._nudged, seconds=min(BATCH_SECONDS, self.pace.heartbeat_seconds))

    async def _report(self) -> bool:
        """One heartbeat. Whether a batch was full, so that more is waiting."""
        batch = () if self.is_delivering else self._spool.batch()
        is_full = len(self._spool) > len(batch) > 0
        report = Report(worker_id=self.worker_id, events=batch)
        orders = await self.wire.ask(f"{self.path}/report", report, Orders, self.job.token, 30)
        is_taken = self._spool.accept(orders.accepted_n)
        self._obey(orders)
        return is_full and is_taken

    def _obey(self, orders: Orders) -> None:
        if orders.stop is StopMode.FORCE:
            self.stop(0)
        elif orders.stop is not None:
            self.stop(orders.stop_in_seconds or 0)
        if orders.should_checkpoint and self._child is not None:
            self._child.signal(signal.SIGUSR2)

    async def _deliver(self, outcome: Outcome) -> None:
        self.is_delivering = True
        receipt = Receipt(
            path=self.path,
            token=self.job.token,
            worker_id=self.worker_id,
            events=self._spool.rest(),
            outcome=outcome,
        )
        place = Path(self.job.attempt_dir)
        try:
            await asyncio.to_thread(receipt.keep, place)
        except OSError as error:
            log.warning("job %s: no receipt could be kept: %s", self.job.job_id, error)
        if await receipt.deliver(self.wire):
            Receipt.forget(place)


def attempt_summary(job: Assignment) -> dict[str, Any]:
    """For the log: what is about to run, without its token."""
    shown = job.model_dump(mode="json", include={"job_id", "fence", "threads", "gpus"})
    return shown | {"method": job.spec.method}


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
            return _failure(event.failure_class, event.message, event.hint)
        case _:
            return None


def _failure(kind: FailureClass, message: str, hint: str = "") -> Outcome:
    return Outcome(kind="failed", failure_class=kind, message=message[:8000], hint=hint)


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


async def _first_of(*events: asyncio.Event, seconds: float) -> None:
    """Until one of them is set, or the time is over."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()

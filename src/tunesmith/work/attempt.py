"""One attempt, supervised: start the trainer, carry its events to the API, obey the orders back."""

import asyncio
import errno
import logging
import signal
from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import FailureClass, FencedError, JobFailure, TuningAPIError
from tunesmith.spec.hands import Assignment, HeldAttempt, Orders, Report
from tunesmith.spec.pipe import (
    Checkpointed,
    TrainerEvent,
    TrainerTask,
)
from tunesmith.spec.records import Outcome, StopMode
from tunesmith.work.fork import Forker
from tunesmith.work.gang import Gang, here
from tunesmith.work.gate import Gate
from tunesmith.work.gate import failed as failed_at_gate
from tunesmith.work.outbound import Outbound
from tunesmith.work.pump import CappedLog, Log
from tunesmith.work.receipt import Answered, Receipt
from tunesmith.work.send import Parcel, Sender
from tunesmith.work.shipping import ShippedLog
from tunesmith.work.spool import Spool
from tunesmith.work.staging import Site, Staging
from tunesmith.work.trainer import MAX_COMPLAINTS, Trainer, failure
from tunesmith.work.wire import Unreachable, Wire

log = logging.getLogger(__name__)

BATCH_SECONDS = 0.5
"""Events wait at most this long for company."""


@dataclass(frozen=True)
class Pace:
    """How often and how long; the operator's settings."""

    heartbeat_seconds: float
    max_log_bytes: int
    leave_seconds: float = 30
    """From a trainer's last word, or the end of its pipe, until its session is killed."""
    gang: Gang = field(default_factory=Gang)


@dataclass
class Attempt:
    """From an assignment to a delivered outcome. Run it once, with `run()`."""

    job: Assignment
    worker_id: str
    wire: Wire
    forker: Forker
    pace: Pace
    module: str = "tunesmith.train"
    site: Site | None = None
    """The worker's own folders; None: the paths of the assignment, as they are."""
    is_delivering: bool = False
    """Whether the trainer has gone and only the API's ear is wanted."""
    is_sending: bool = False
    """Whether a model or a checkpoint goes there too, which may take long."""
    _is_fenced: bool = False
    _refused: int = 0
    """Reports that the API would not have."""
    _said: asyncio.Event = field(default_factory=asyncio.Event)
    _nudged: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._spool = Spool(self.job.first_event_n)
        self.staging = Staging(self.job, self.wire, self.site)
        self.trainer = Trainer(
            self.job.job_id, self.job.stall_seconds, self.pace.leave_seconds, self._hear
        )
        self._log: Log | None = None
        self._outbound: Outbound | None = None

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

    @property
    def is_busy(self) -> bool:
        """Whether there is more to do than to tell of the end."""
        return self.is_sending or not self.is_delivering

    def nudge(self) -> None:
        """New orders are waiting: fetch them now."""
        self._nudged.set()

    def stop(self, seconds: float) -> None:
        """Ask for a checkpoint and an end; the session is killed after `seconds`."""
        self.trainer.stop(seconds)

    # the trainer

    async def _end(self) -> Outcome:
        try:
            self.staging.attempt_dir.mkdir(parents=True, exist_ok=True)
            return await self._train()
        except FencedError:
            self._fence()
            return Outcome(kind="stopped")
        except JobFailure as fault:
            return failure(fault.failure_class, str(fault), fault.hint)
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = FailureClass.DISK_FULL if is_full else FailureClass.INFRA_LOST
            return failure(kind, f"cannot start: {error}")
        except Exception as error:
            log.exception("job %s: supervising failed", self.job.job_id)
            return failure(FailureClass.INFRA_LOST, f"the worker failed: {error!r}")

    async def _train(self) -> Outcome:
        task = await self.trainer.unless_halted(self._task())
        if task is None:
            return Outcome(kind="stopped")
        journal = self._log = self._journal()
        carriers = self._carriers()
        try:
            await self.trainer.unless_halted(self.forker.wait_ready(30))
            if self.trainer.halt.is_set():
                return Outcome(kind="stopped")
            journal.line(f"[attempt {self.job.fence} starts; resumes from {task.resume_from}]")
            return await self._supervise(task, journal)
        finally:
            journal.close()
            for carrier in carriers:
                carrier.cancel()
            await asyncio.gather(*carriers, return_exceptions=True)

    async def _task(self) -> TrainerTask:
        return TrainerTask(
            job_id=self.job.job_id,
            fence=self.job.fence,
            spec=self.job.spec,
            inputs=await self.staging.inputs(),
            attempt_dir=str(self.staging.attempt_dir),
            resume_from=await self.staging.newest_checkpoint(self._say),
            plan=self.job.plan,
        )

    def _journal(self) -> Log:
        if self.staging.is_remote:
            return ShippedLog(self.wire, self.path, self.job.token)
        return CappedLog(self.staging.log_path, self.pace.max_log_bytes)

    def _carriers(self) -> "list[asyncio.Task[None]]":
        """What carries log and checkpoints to an API whose folder is not to be seen from here."""
        if not isinstance(self._log, ShippedLog):
            return []
        assert self.site is not None
        sender = Sender(self.wire, self.path, self.job.token)
        outgoing = self.staging.attempt_dir / "outgoing"
        self._outbound = Outbound(sender, outgoing, self.site.cache, self._say)
        return [asyncio.create_task(self._log.ship()), asyncio.create_task(self._outbound.run())]

    async def _supervise(self, task: TrainerTask, journal: Log) -> Outcome:
        environment = {"OMP_NUM_THREADS": str(self.job.threads)}
        if self.job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, here(self.job.gpus)))
        body = task.model_dump_json().encode()
        outcome = await self.trainer.run(self.forker, self._program(), environment, body, journal)
        device = "cuda:0" if self.job.gpus else "cpu"
        gate = Gate(self.forker, task, environment, device, journal)
        return await self._pass(gate, outcome) if gate.is_wanted(outcome) else outcome

    async def _pass(self, gate: Gate, outcome: Outcome) -> Outcome:
        """The outcome, or what becomes of it at the gate; a stop leaves it to the next attempt."""
        notice = await self.trainer.unless_halted(gate.judge(outcome))
        if notice is None:
            return Outcome(kind="stopped", step=outcome.step)
        self._say(notice, len(notice.message) + 500)
        if notice.level != "error":
            return outcome
        assert outcome.artifact
        return failed_at_gate(outcome, notice, self.staging.to_theirs(outcome.artifact))

    def _program(self) -> tuple[str, list[str]]:
        """Module and arguments: several processes start under torchrun."""
        plan = self.job.plan
        processes = plan.processes if plan else self.job.spec.run.devices
        if processes == 1:
            return self.module, []
        return f"{self.module}.launch", self.pace.gang.arguments(self.job.job_id, processes)

    def _hear(self, event: TrainerEvent, size: int) -> None:
        """The API is told of a checkpoint under its own name for the place, once it has it all."""
        if not isinstance(event, Checkpointed):
            self._say(event, size)
        elif self._outbound is not None:
            self._outbound.take(event)
        else:
            path = self.staging.to_theirs(event.path)
            self._say(event.model_copy(update={"path": path}), size)

    def _say(self, event: TrainerEvent, size: int = 500) -> None:
        self._spool.add(event.model_dump(mode="json"), size)
        self._said.set()

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
                self._fence()
            except TuningAPIError as error:
                self._refused += 1
                if self._refused <= MAX_COMPLAINTS:
                    log.warning("job %s: the API refused a report: %s", self.job.job_id, error)
                await asyncio.sleep(self.pace.heartbeat_seconds)
            else:
                if not is_more_waiting:
                    await self._pause()

    def _fence(self) -> None:
        """Another attempt owns the job: nothing of this one is wanted any more."""
        self._is_fenced = True
        self.trainer.kill()

    async def _pause(self) -> None:
        """Until a heartbeat is due, or something was said and has waited for company."""
        if not self._nudged.is_set():
            await first_of(self._said, self._nudged, seconds=self.pace.heartbeat_seconds)
        if not self._nudged.is_set():
            await first_of(self._nudged, seconds=min(BATCH_SECONDS, self.pace.heartbeat_seconds))

    async def _report(self) -> bool:
        """One heartbeat. Whether a batch was full, so that more is waiting."""
        batch = () if self.is_delivering else self._spool.batch()
        is_full = len(self._spool) > len(batch) > 0
        report = Report(worker_id=self.worker_id, events=batch)
        orders = await self.wire.ask(f"{self.path}/report", report, Orders, self.job.token, 30)
        is_taken = self._spool.accept(orders.accepted_n)
        self.staging.note_known([one.event for one in batch if one.n <= orders.accepted_n])
        self._obey(orders)
        return is_full and is_taken

    def _obey(self, orders: Orders) -> None:
        if orders.stop is StopMode.FORCE:
            self.stop(0)
        elif orders.stop is not None:
            self.stop(orders.stop_in_seconds or 0)
        if orders.should_checkpoint:
            self.trainer.signal(signal.SIGUSR2)

    async def _deliver(self, outcome: Outcome) -> None:
        self.is_delivering = True
        parcels = self._parcels(outcome)
        self.is_sending = bool(parcels)
        receipt = Receipt(
            path=self.path,
            token=self.job.token,
            worker_id=self.worker_id,
            events=self._spool.rest(),
            outcome=self._named(outcome),
            parcels=parcels,
            log=self._log.rest() if isinstance(self._log, ShippedLog) else None,
        )
        place = self.staging.attempt_dir
        try:
            await asyncio.to_thread(receipt.keep, place)
        except OSError as error:
            log.warning("job %s: no receipt could be kept: %s", self.job.job_id, error)
        answered = await receipt.hand_over(self.wire)
        if answered is not Answered.NOT:
            Receipt.forget(place)
            if self._outbound is not None and outcome.kind == "succeeded":
                self._outbound.forget()
            if self.staging.is_remote and answered is Answered.TAKEN:
                await asyncio.to_thread(self.staging.clear)

    def _parcels(self, outcome: Outcome) -> tuple[Parcel, ...]:
        """What the API must have before it hears of the end: the model, or the last checkpoint."""
        if self._outbound is None:
            return ()
        if outcome.artifact and outcome.manifest_sha256:
            return (
                Parcel(
                    kind="artifact",
                    step=outcome.step,
                    folder=outcome.artifact,
                    manifest_sha256=outcome.manifest_sha256,
                ),
            )
        left = self._outbound.left()
        if left is None:
            return ()
        self._say(left.model_copy(update={"path": self.staging.to_theirs(left.path)}))
        return (self._outbound.parcel(left),)

    def _named(self, outcome: Outcome) -> Outcome:
        """With the API's name for where the model is."""
        if outcome.artifact is None:
            return outcome
        return outcome.model_copy(update={"artifact": self.staging.to_theirs(outcome.artifact)})


def attempt_summary(job: Assignment) -> dict[str, Any]:
    """For the log: what is about to run, without its token."""
    shown = job.model_dump(mode="json", include={"job_id", "fence", "threads", "gpus"})
    return shown | {"method": job.spec.method}


async def first_of(*events: asyncio.Event, seconds: float) -> None:
    """Until one of them is set, or the time is over."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()

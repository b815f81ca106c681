"""The hands of one host: ask for work, run what fits, report, stop cleanly."""

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import logging
import math
import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tunesmith.errors import AuthenticationError, TuningAPIError
from tunesmith.settings import Settings
from tunesmith.spec.hands import Assignment, HeldAttempt, Orders, WorkAsk, WorkReply
from tunesmith.spec.records import Outcome
from tunesmith.work.attempt import Attempt, Pace, attempt_summary, first_of
from tunesmith.work.cache import Cache
from tunesmith.work.capacity import Host, host_name, visible_gpus
from tunesmith.work.engines import Engines
from tunesmith.work.fork import Forker
from tunesmith.work.gang import Gang
from tunesmith.work.place import house_id, network, own_mark
from tunesmith.work.receipt import Receipt, left_over
from tunesmith.work.session import die_with_parent
from tunesmith.work.staging import Site
from tunesmith.work.wire import ADDRESS, Unreachable, Wire

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 30.0
"""For trainers to write a checkpoint and end, before they are killed."""
DELIVER_SECONDS = 3.0
"""For an API that is away, at the end: what could not be told is kept as a receipt."""
EXIT_LOCKED = 75
LOCK = f"worker.{host_name()}.lock"
"""One a host: several may share the folder."""
RING_SIGNAL = signal.SIGURG
"""Ask now, where a bell is set. Of the signals that do nothing to a process that expects none."""
RUNG_SECONDS = 3.0
"""The patience of an idle worker's question, where a bell wakes it: a back-off may soon end."""
RETURN_SECONDS = 10.0
"""For a receipt of the one job that is wanted, before it is claimed."""
ALONE_SECONDS = 60.0
"""A worker for one job gives up where no API answers for so long before its claim."""


def run(
    settings: Settings,
    server: str | None = None,
    token: str | None = None,
    is_beside: bool = False,
) -> int:
    """Work until SIGTERM or SIGINT. Returns the exit status; 75 where another worker is here.

    `is_beside`: started by a server, which writes its address down before, and takes it away when
    it is stopped. Where it was killed just then, and the next one came and went meanwhile, nobody
    would be left to stop this worker.
    """
    with locked(settings) as is_alone:
        if not is_alone:
            log.error("another worker already serves this workspace on this host")
            return EXIT_LOCKED
        if is_beside and not (settings.home / ADDRESS).exists():
            log.warning("the server that started this worker has gone")
            return 0
        asyncio.run(Worker(settings, server, token).work())
    return 0


@contextlib.contextmanager
def locked(settings: Settings, lock_name: str = LOCK) -> Iterator[bool]:
    """Be the only one on this host, with the process id written down; False where one is here."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (settings.home / lock_name).open("a") as lock:
        if not _locked(lock, patience_seconds=0.5):
            yield False
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield True


def is_running(settings: Settings, lock_name: str = LOCK) -> bool:
    """Whether a worker holds this workspace's lock on this host."""
    place = settings.home / lock_name
    if not place.exists():
        return False
    with place.open("a") as lock:
        if _locked(lock):
            fcntl.flock(lock, fcntl.LOCK_UN)
            return False
    return True


def running_pid(settings: Settings, lock_name: str = LOCK) -> int | None:
    """The worker's process id, as it wrote it down; None where none is running."""
    if not is_running(settings, lock_name):
        return None
    text = (settings.home / lock_name).read_text().strip()
    return int(text) if text.isdigit() and is_ours(int(text)) else None


def is_ours(pid: int) -> bool:
    """A number that is left over from an earlier worker may be anyone's by now, or nobody's."""
    try:
        return b"tunesmith" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _locked(lock: TextIO, patience_seconds: float = 0) -> bool:
    """A look at the lock takes it for a moment: who wants it for good tries a few times."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


@dataclass
class Worker:
    settings: Settings
    server: str | None = None
    token: str | None = None
    only: str = ""
    """The one job to claim: `work` ends with it, or at once where it can't be had."""
    _attempts: dict[HeldAttempt, tuple[Attempt, "asyncio.Task[None]"]] = field(default_factory=dict)
    """By job and fence: a job may be claimed anew before its fenced attempt has gone."""
    _returning: dict[HeldAttempt, "asyncio.Task[None]"] = field(default_factory=dict)
    """Receipts of an earlier worker, under way."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _rung: asyncio.Event = field(default_factory=asyncio.Event)
    _has_answer: bool = False

    def __post_init__(self) -> None:
        home = self.settings.home
        place = hashlib.sha256(str(home).encode()).hexdigest()[:8]
        self.worker_id = f"{host_name()[:64]}-{place}"
        if self.server and not house_id(home):
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.worker_id += f"-{own_mark(home)}"
        if self.only:  # several may be on a host
            self.worker_id += f"-{uuid.uuid4().hex[:8]}"
        self.boot_id = uuid.uuid4().hex
        self._claim_id = uuid.uuid4().hex
        gang = Gang(self.settings.gang_nodes, self.settings.gang_endpoint)
        self.host = Host(
            self.settings.slots,
            self.settings.memory_reserve_bytes,
            gang.gpus(visible_gpus(self.settings.visible_gpus)),
        )
        self.pace = Pace(self.settings.heartbeat_seconds, self.settings.max_log_bytes, gang=gang)
        self.site = Site(home, Cache(home / "cache", self.settings.cache_bytes))

    async def work(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(RING_SIGNAL, self._rung.set)
        home = self.settings.home
        self.wire = Wire(home, self.server, self.token, self.settings.ca_bundle)
        self.site.tidy()
        is_warm = self.settings.should_fork_trainers and not self.only
        self.forker = Forker(is_warm, home / "zygote.log")
        command = self.settings.engine_command
        forker = Forker(False, home / "zygote.log") if command else self.forker
        most = self.settings.max_log_bytes
        self.engines = Engines(self.worker_id, self.wire, forker, most, command=command)
        self.forker.warm_up()
        self._send_receipts()
        asking = asyncio.create_task(self._ask_for_ever())
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([asking, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (asking, stopped):
                task.cancel()
            [failure, _] = await asyncio.gather(asking, stopped, return_exceptions=True)
            await self._shut_down()
        if isinstance(failure, Exception):
            raise failure

    async def _shut_down(self) -> None:
        """Trainers write a checkpoint and end, their jobs are queued again; engines end."""
        log.info("stopping: %d attempts", len(self._attempts))
        for attempt, _ in self._attempts.values():
            attempt.stop(SHUTDOWN_SECONDS)
        await asyncio.gather(self.engines.close(), self._see_off())
        self.forker.close()
        await self.wire.close()

    async def _see_off(self) -> None:
        """Until all attempts have ended, and what only waits for the API had its chance."""
        deadline = time.monotonic() + SHUTDOWN_SECONDS + 5
        only_waiting_since = math.inf
        self.wire.stir()
        await self._give_back()
        while tasks := self._under_way():
            if (now := time.monotonic()) > deadline:
                return
            if any(attempt.is_busy for attempt, _ in self._attempts.values()):
                only_waiting_since = math.inf
            else:
                only_waiting_since = min(only_waiting_since, now)
                if now - only_waiting_since > DELIVER_SECONDS:
                    return
            await asyncio.wait(tasks, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)

    def _under_way(self) -> "list[asyncio.Task[None]]":
        return [*(task for _, task in self._attempts.values()), *self._returning.values()]

    async def _give_back(self) -> None:
        """A claim may have been on its way to us when the poll was broken off: ask for it again,
        and return it unused, so that its job need not wait for the lease to lapse."""
        full = self.host.capacity().model_copy(update={"slots": 0, "gpus": (), "memory_bytes": 0})
        last = self._question(self._claim_id).model_copy(
            update={"capacity": full, "wait_seconds": 0}
        )
        with contextlib.suppress(Unreachable, TuningAPIError):
            reply = await self.wire.ask("/work", last, WorkReply, seconds=3)
            if reply.attempt is not None and not self._has(reply.attempt):
                path = f"/attempts/{reply.attempt.job_id}/{reply.attempt.fence}/finish"
                outcome = Outcome(kind="stopped")
                await self.wire.ask(path, outcome, Orders, reply.attempt.token, seconds=3)

    def _send_receipts(self) -> None:
        for folder, receipt in left_over(self.settings.home / "jobs", self.only or "*"):
            log.info("delivering the outcome that was left at %s", receipt.path)
            task = asyncio.create_task(self._redeliver(folder, receipt))
            self._returning[receipt.attempt] = task

    async def _redeliver(self, folder: Path, receipt: Receipt) -> None:
        try:
            if await receipt.redeliver(self.wire, self.pace.heartbeat_seconds):
                Receipt.forget(folder)
        finally:
            self._returning.pop(receipt.attempt, None)

    async def _ask_for_ever(self) -> None:
        """A long poll, asked anew whenever this host's capacity changes.

        With a bell, an idle worker asks when it is rung, and every `poll_seconds`.
        """
        pause, since = 0.2, time.monotonic()
        if self.only and self._returning:  # what it had already done need not be done again
            await asyncio.wait(self._returning.values(), timeout=RETURN_SECONDS)
        while not self._is_done(since):
            self._changed.clear()
            self._rung.clear()
            asking = asyncio.create_task(self._ask(self._claim_id))
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait([asking, changed], return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():
                    # a claim may be on its way to us: the same claim id brings it again
                    continue
                reply = asking.result()
            except Unreachable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5)
                continue
            except AuthenticationError as error:
                if pause < 5:  # said a few times, not for ever
                    log.error("the API does not know this worker's token: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5)
                continue
            except TuningAPIError as error:
                log.error("the API refused to give work: %s", error)
                await asyncio.sleep(5)
                continue
            finally:
                asking.cancel()
                changed.cancel()
                await asyncio.gather(asking, changed, return_exceptions=True)
            pause = 0.2
            self._claim_id = uuid.uuid4().hex
            self._has_answer = True
            self._obey(reply)
            if self._may_rest():
                seconds = self.settings.poll_seconds
                await first_of(self._rung, self._changed, self._stopping, seconds=seconds)

    def _is_done(self, since: float) -> bool:
        """Whether the one job that is wanted has ended, or can't be had."""
        if not self.only or self._attempts:
            return False
        return self._has_answer or time.monotonic() - since > ALONE_SECONDS

    def _may_rest(self) -> bool:
        """Who holds something is reached by a long poll only: orders come that way."""
        is_busy = bool(self._held() or self.engines.statuses())
        return self.settings.bell != "poll" and not is_busy and not self.only

    async def _ask(self, claim_id: str) -> WorkReply:
        self.forker.warm_up()
        return await self.wire.ask("/work", self._question(claim_id), WorkReply)

    def _question(self, claim_id: str) -> WorkAsk:
        return WorkAsk(
            worker_id=self.worker_id,
            boot_id=self.boot_id,
            claim_id=claim_id,
            capacity=self.host.capacity(),
            engines=self.engines.statuses(),
            held=self._held(),
            host={"name": host_name(), "pid": os.getpid(), "cores": os.cpu_count() or 1},
            wait_seconds=20
            if self._attempts or not (self.only or self._may_rest())
            else RUNG_SECONDS,
            only=self.only or None,
            house_id=house_id(self.settings.home),
            network=network(),
        )

    def _held(self) -> tuple[HeldAttempt, ...]:
        return tuple({*self._attempts, *self._returning})

    def _has(self, job: Assignment) -> bool:
        return HeldAttempt(job_id=job.job_id, fence=job.fence) in self._attempts

    def _obey(self, reply: WorkReply) -> None:
        if reply.attempt is not None and not self._has(reply.attempt):
            parts = (self.worker_id, self.wire, self.forker, self.pace)
            self._begin(Attempt(reply.attempt, *parts, site=self.site))
        for order in reply.engines:
            self.engines.obey(order)
        for held in reply.nudges:
            if held in self._attempts:
                self._attempts[held][0].nudge()

    def _begin(self, attempt: Attempt) -> None:
        log.info("claimed %s", attempt_summary(attempt.job))
        task = asyncio.create_task(attempt.run())
        self._attempts[attempt.held] = (attempt, task)
        self.host.held[attempt.held] = attempt.job
        task.add_done_callback(lambda done: self._ended(attempt.held, done))

    def _ended(self, held: HeldAttempt, task: "asyncio.Task[None]") -> None:
        self._attempts.pop(held, None)
        self.host.held.pop(held, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("job %s: supervising failed", held.job_id, exc_info=task.exception())
        self._changed.set()


def main(argv: list[str] | None = None) -> int:
    """`python -m tunesmith.work.worker`: as others start it, its settings by environment."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.work.worker")
    parser.add_argument("--parent", type=int, metavar="PID", help="be killed when this one ends")
    parser.add_argument("--server", metavar="URL", help="with TUNESMITH_WORKER_TOKEN")
    parser.add_argument("--beside", action="store_true", help="started by a server of this folder")
    parser.add_argument("--only", metavar="JOB", default="", help="run this job, then end")
    asked = parser.parse_args(argv)
    if asked.parent is not None and not _is_tied_to(asked.parent):
        return 1
    settings = Settings.read()
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    token = settings.worker_token.get_secret_value() if asked.server else None
    if asked.only:
        asyncio.run(Worker(settings, asked.server, token, only=asked.only).work())
        return 0
    return run(settings, asked.server, token, asked.beside)


def _is_tied_to(parent: int) -> bool:
    """Die with the thread that started this process; False where it has gone already."""
    die_with_parent()
    return os.getppid() == parent


if __name__ == "__main__":
    raise SystemExit(main())

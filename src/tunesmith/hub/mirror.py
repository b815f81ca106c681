"""The duty that carries every job's events to MLflow, at least once, and never in anyone's way."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.errors import TuningAPIError
from tunesmith.hub.metrics import FINAL, STATUS, name_of, params_of, points, tags_of, told_by
from tunesmith.hub.mlflow import Away, Rejected, Tracking, pairs
from tunesmith.spec.records import Job, JobEvent
from tunesmith.store import events, jobs, mirrors
from tunesmith.store.mirrors import Mirror

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

DUTY = "mirror"
EXPERIMENT = "tunesmith"
WIDTH = 4
"""Runs at once."""
EVENTS = 150
"""In one batch."""
BATCHES = 8
"""Of one run in a turn: then others come."""
LEASE_SECONDS = 90.0
TURN_SECONDS = 60.0
"""Less than the lease: what takes longer is left where it is."""
LOOK_SECONDS = 1.0
NO_DUTY_SECONDS = 5.0
MAX_REST_SECONDS = 60.0
MAX_TRIES = 12
"""Refusals of one run in a row, with up to an hour between, before it is given up."""
MAX_WAIT_SECONDS = 3600.0


class MlflowMirror:
    """A task of the server's. `run` ends only when it is cancelled."""

    def __init__(self, hub: "Hub", tracking: Tracking) -> None:
        self._hub, self._tracking = hub, tracking
        self._holder = hub.duties.holder
        self._failures = 0
        self._rests_until = 0.0
        self._has_taken_over = False

    async def run(self) -> None:
        try:
            with self._hub.watcher.watch(mirrors.TOPIC) as rung:
                while True:
                    rung.clear()
                    wait = await self._turn_safely()
                    if wait > 0:
                        await self._hub.wait(rung, wait)
        finally:
            await self._tracking.close()
            await self._hub.write(lambda tx: mirrors.release(tx, self._holder))

    async def _turn_safely(self) -> float:
        try:
            return await self._turn()
        except TuningAPIError as error:  # a full disk, a database that is away
            log.warning("the MLflow mirror waits: %s", error)
        except Exception:
            log.exception("a turn of the MLflow mirror failed")
        return NO_DUTY_SECONDS

    async def _turn(self) -> float:
        """Carry some. Returns the seconds until it is worth looking again."""
        if not await self._hub.duty(DUTY):
            return NO_DUTY_SECONDS
        await self._take_over()
        rest = self._rests_until - time.monotonic()
        if rest > 0:
            await asyncio.sleep(rest)
        if not self._hub.store.read(mirrors.has_due):
            return LOOK_SECONDS
        width = 1 if self._failures else WIDTH
        taken = await self._hub.write(
            lambda tx: mirrors.claim(tx, self._holder, width, LEASE_SECONDS)
        )
        await asyncio.gather(*(self._carry_safely(row) for row in taken))
        return 0.0 if taken else LOOK_SECONDS

    async def _take_over(self) -> None:
        """Once: where no other server can be, whoever held something is dead."""
        if self._has_taken_over:
            return
        await self._hub.write(mirrors.owe_unfinished)
        if self._hub.store.is_alone:
            await self._hub.write(lambda tx: mirrors.release(tx, None))
        self._has_taken_over = True

    async def _carry_safely(self, row: Mirror) -> None:
        wait, error, is_done = LOOK_SECONDS, None, False
        try:
            async with asyncio.timeout(TURN_SECONDS):
                wait, is_done = await self._carry(row)
            self._recover()
        except (Away, TimeoutError) as trouble:
            error = str(trouble) or "MLflow is too slow"
            self._rest(error)
            wait = 0.0
        except Rejected as refusal:
            self._recover()
            wait, error, is_done = self._refused(row, refusal)
        await self._hub.write(
            lambda tx: mirrors.let_go(tx, row.job_id, self._holder, wait, error, is_done)
        )

    def _refused(self, row: Mirror, refusal: Rejected) -> tuple[float, str, bool]:
        log.warning("job %s: MLflow refused: %s", row.job_id, refusal)
        wait = min(MAX_WAIT_SECONDS, 2.0 ** min(row.tries, 30))
        return wait, str(refusal), row.tries >= MAX_TRIES

    def _rest(self, error: str) -> None:
        """The whole server is away: nobody is asked for a while."""
        if not self._failures:
            log.warning("MLflow: %s; jobs go on, and it is told later", error)
        self._failures += 1
        wait = min(MAX_REST_SECONDS, 2.0 ** min(self._failures - 1, 30))
        self._rests_until = time.monotonic() + wait * random.uniform(0.75, 1.25)

    def _recover(self) -> None:
        if self._failures:
            log.info("MLflow answers again")
        self._failures = 0

    async def _carry(self, row: Mirror) -> tuple[float, bool]:
        """Tell the run what it has not heard. Returns when to come again, and whether it is over.

        Raises Away, Rejected.
        """
        job = self._hub.store.read(lambda tx: jobs.get(tx, row.job_id))
        run_id, seq, step = row.run_id, row.sent_seq, row.sent_step
        if run_id is None:
            run_id, seq, step = await self._run_for(job), 0, 0
        for _ in range(BATCHES):
            batch = self._hub.store.read(
                partial(events.after, job_id=job.id, seq=seq, limit=EVENTS)
            )
            if run_id is None or not batch:
                return LOOK_SECONDS, False
            try:
                step = await self._tell(run_id, job, batch, step)
            except Rejected as refusal:
                if not refusal.is_missing:
                    raise
                await self._start_over(job, row)
                return 0.0, False
            seq = batch[-1].seq
            if not await self._advance(job.id, seq, step) or batch[-1].type in FINAL:
                return 0.0, batch[-1].type in FINAL
        return 0.0, False

    async def _advance(self, job_id: str, seq: int, step: int) -> bool:
        return await self._hub.write(
            lambda tx: mirrors.advance(tx, job_id, self._holder, seq, step)
        )

    async def _start_over(self, job: Job, row: Mirror) -> None:
        """MLflow does not know the run any more: its database is another. All is told anew."""
        log.warning("job %s: MLflow has lost run %s; a new one is made", job.id, row.run_id)
        lost = row.experiment_id or ""
        await self._hub.write(lambda tx: mirrors.record_run(tx, job.id, self._holder, lost, None))

    async def _run_for(self, job: Job) -> str | None:
        """The job's run: the one that carries its id, else a new one. None where another process
        was quicker to record one."""
        place = await self._tracking.experiment(EXPERIMENT)
        found = await self._tracking.find_run(place, job.id)
        run_id = found or await self._tracking.create_run(
            place, name_of(job), job.owner, int(job.created_at * 1000), pairs(tags_of(job))
        )
        is_ours = await self._hub.write(
            lambda tx: mirrors.record_run(tx, job.id, self._holder, place, run_id)
        )
        if is_ours:
            return run_id
        if found is None:
            await self._tracking.delete_run(run_id)
        return None

    async def _tell(self, run_id: str, job: Job, batch: Sequence[JobEvent], step: int) -> int:
        """One batch of events. Returns the last training step that the run has then."""
        is_first = batch[0].seq == 1
        params = pairs(params_of(job)) if is_first else []
        metrics, step = points(batch, step)
        await self._tracking.log(run_id, metrics, params, pairs(told_by(batch)))
        changes = [event for event in batch if event.type in STATUS]
        if changes:
            last = changes[-1]
            end_ms = int(last.at * 1000) if last.type in FINAL else None
            await self._tracking.update(run_id, STATUS[last.type], end_ms)
        return step

"""The API's side of the workers' protocol: work given out, reports taken, ends recorded."""

import asyncio
import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith.errors import ConflictError, FailureClass, FencedError
from tunesmith.manifest import MANIFEST, BrokenManifest, verify
from tunesmith.spec.hands import Assignment, HeldAttempt, Orders, Report, WorkAsk, WorkReply
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.records import Job, JobState, Outcome
from tunesmith.store import claims, endings, events, jobs
from tunesmith.store.promotion import promote

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

SILENT_SECONDS = 45.0
"""A worker that has not asked for so long counts as gone (its poll lasts at most 60 s)."""
BACKOFF_SECONDS = 1.0


class Hands:
    """One a server. Methods are called from its event loop."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._boots: dict[str, str] = {}
        self._seen: dict[str, float] = {}
        self._nudged: set[tuple[str, int, str]] = set()
        self._finishing: dict[tuple[str, int], asyncio.Lock] = {}

    def living_workers(self) -> int:
        now = time.monotonic()
        return sum(now - seen < SILENT_SECONDS for seen in self._seen.values())

    async def greet(self, ask: WorkAsk) -> None:
        """A worker that was started anew has lost what it does not hold: it is queued again."""
        self._seen[ask.worker_id] = time.monotonic()
        if self._boots.get(ask.worker_id) == ask.boot_id:
            return
        held = {(attempt.job_id, attempt.fence) for attempt in ask.held}
        lost = await self._hub.write(
            lambda tx: endings.forget_boot(
                tx,
                ask.worker_id,
                held,
                max_lapses=self._hub.settings.max_lapses,
                backoff_seconds=0.1,
            )
        )
        self._boots[ask.worker_id] = ask.boot_id
        for job in lost:
            log.warning("job %s was lost by worker %s; now %s", job.id, ask.worker_id, job.state)

    async def work_for(self, ask: WorkAsk) -> WorkReply | None:
        """What this worker should do next; None where there is nothing."""
        self._seen[ask.worker_id] = time.monotonic()
        orders = await self._hub.engines.orders(ask)
        nudges = self._nudges(ask)
        attempt = await self._claim(ask)
        if attempt is None and not orders and not nudges:
            return None
        return WorkReply(attempt=attempt, engines=orders, nudges=nudges)

    async def report(self, job_id: str, fence: int, token: str, body: Report) -> Orders:
        """A heartbeat with events. Raises AuthenticationError, FencedError."""

        def work(tx: Connection) -> Orders:
            claims.check_token(tx, job_id, fence, token)
            if body.events:
                events.append(tx, job_id, fence, body.worker_id, body.events)
            return claims.heartbeat(
                tx, job_id, fence, body.worker_id, lease_seconds=self._hub.settings.lease_seconds
            )

        return await self._hub.write(work)

    async def finish(self, job_id: str, fence: int, token: str, outcome: Outcome) -> Orders:
        """Record an attempt's end; a success only with an artifact whose every byte is there."""
        self._hub.store.read(lambda tx: claims.check_token(tx, job_id, fence, token))
        # A worker that lost patience asks again: one reading of the artifact at a time is enough.
        gate = self._finishing.setdefault((job_id, fence), asyncio.Lock())
        try:
            async with gate:
                return await self._finish(job_id, fence, outcome)
        finally:
            if not gate.locked():
                self._finishing.pop((job_id, fence), None)

    async def _finish(self, job_id: str, fence: int, outcome: Outcome) -> Orders:
        told = await asyncio.to_thread(self._checked, job_id, fence, outcome)

        try:
            job = await self._record(job_id, fence, told)
        except FencedError:
            raise
        except (ConflictError, BrokenManifest) as refusal:  # its place was taken meanwhile
            told = _unplaced(told, refusal)
            job = await self._record(job_id, fence, told)
        log.info("job %s: attempt %d ended %s; now %s", job_id, fence, told.kind, job.state)
        return Orders(lease_seconds=self._hub.settings.lease_seconds)

    async def _record(self, job_id: str, fence: int, told: Outcome) -> Job:
        def work(tx: Connection) -> Job:
            return endings.finish(
                tx,
                job_id,
                fence,
                told,
                promote=lambda job: self._promote(job, told),
                max_lapses=self._hub.settings.max_lapses,
                backoff_seconds=BACKOFF_SECONDS,
            )

        return await self._hub.write(work)

    def _promote(self, job: Job, outcome: Outcome) -> str:
        """Under the fence, on the writer's thread; done again, it changes nothing."""
        assert outcome.artifact
        assert outcome.manifest_sha256
        place = promote(
            Path(outcome.artifact),
            Path(job.output_dir),
            manifest_sha256=outcome.manifest_sha256,
            journal=self._hub.settings.home / "promotions",
        )
        return str(place)

    async def grant_grace(self) -> None:
        """At the start: workers that outlived the last server get the time to come back."""
        lease = self._hub.settings.lease_seconds
        await self._hub.write(lambda tx: jobs.grant_grace(tx, lease))

    async def reap(self) -> None:
        settings = self._hub.settings
        lapsed = await self._hub.write(
            lambda tx: endings.reap(
                tx, max_lapses=settings.max_lapses, backoff_seconds=BACKOFF_SECONDS
            )
        )
        for job in lapsed:
            log.warning("job %s: its lease lapsed; now %s", job.id, job.state)

    async def _claim(self, ask: WorkAsk) -> Assignment | None:
        """A write only where there is something to claim: an idle poll costs no commit."""
        if not self._hub.store.read(lambda tx: claims.may_claim(tx, ask)):
            return None
        claimed = await self._hub.write(
            lambda tx: claims.claim(tx, ask, lease_seconds=self._hub.settings.lease_seconds)
        )
        return None if claimed is None else self._assignment(claimed, ask)

    def _assignment(self, claimed: claims.Claimed, ask: WorkAsk) -> Assignment:
        job, settings = claimed.job, self._hub.settings
        busy = ask.capacity.max_slots - ask.capacity.slots
        threads = max(1, ask.capacity.max_slots // (busy + 1))
        folder = settings.home / "jobs" / job.id
        evaluation = job.eval_dataset.path if job.eval_dataset else None
        return Assignment(
            job_id=job.id,
            fence=claimed.fence,
            token=claimed.token,
            spec=job.spec,
            inputs=Inputs(model=job.model.path, dataset=job.dataset.path, eval_dataset=evaluation),
            attempt_dir=str(folder / "attempts" / str(claimed.fence)),
            log_path=str(self._hub.log_path(job.id)),
            plan=job.plan,
            threads=job.plan.threads if job.plan else threads,
            gpus=claimed.gpus,
            checkpoints=claimed.checkpoints,
            resume_from=job.resume_from,
            lease_seconds=settings.lease_seconds,
            stall_seconds=settings.stall_seconds,
            first_event_n=claimed.first_event_n,
        )

    def _nudges(self, ask: WorkAsk) -> tuple[HeldAttempt, ...]:
        """Held attempts that were asked to stop and have not been told yet."""
        if not ask.held:
            return ()
        stopping = self._hub.store.read(
            lambda tx: jobs.list_jobs(tx, states=[JobState.STOPPING], limit=10_000)
        )
        wanted = {(job.id, job.fence): job.stop_mode for job in stopping}
        self._nudged &= {(job.id, job.fence, str(job.stop_mode)) for job in stopping}
        found = []
        for held in ask.held:
            mode = wanted.get((held.job_id, held.fence))
            mark = (held.job_id, held.fence, str(mode))
            if mode is not None and mark not in self._nudged:
                self._nudged.add(mark)
                found.append(held)
        return tuple(found)

    def _checked(self, job_id: str, fence: int, outcome: Outcome) -> Outcome:
        """The outcome, or `no_artifact` where what is promised is not in the attempt's folder."""
        if outcome.kind != "succeeded":
            return outcome
        place = self._hub.settings.home / "jobs" / job_id / "attempts" / str(fence)
        artifact = Path(outcome.artifact or "")
        try:
            if artifact.parent != place:
                raise BrokenManifest("the artifact is not in its attempt's folder")
            if not artifact.exists() and self._is_promoted(job_id, outcome):
                return outcome
            verify(artifact, outcome.manifest_sha256)
        except BrokenManifest as error:
            return Outcome(
                kind="failed",
                failure_class=FailureClass.NO_ARTIFACT,
                message=f"the trainer's result is not whole: {error}",
            )
        return outcome

    def _is_promoted(self, job_id: str, outcome: Outcome) -> bool:
        """Whether an earlier telling of this outcome moved the artifact to its place already."""
        job = self._hub.store.read(lambda tx: jobs.get(tx, job_id))
        try:
            body = (Path(job.output_dir) / MANIFEST).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(body).hexdigest() == outcome.manifest_sha256


def _unplaced(outcome: Outcome, refusal: Exception) -> Outcome:
    """The model is made, but cannot go where it should: it stays in its attempt's folder."""
    return Outcome(
        kind="failed",
        step=outcome.step,
        failure_class=FailureClass.USER_ERROR,
        message=f"the model could not be put in its place: {refusal}; it is at {outcome.artifact}",
    )

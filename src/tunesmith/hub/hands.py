"""The API's side of the workers' protocol: work given out, reports taken, ends recorded."""

import asyncio
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith.errors import ConflictError, FailureClass, FencedError
from tunesmith.manifest import MANIFEST, BrokenManifest, verify
from tunesmith.spec.hands import Assignment, HeldAttempt, Orders, Report, WorkAsk, WorkReply
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.records import Job, JobState, Outcome
from tunesmith.spec.rewards import services_in
from tunesmith.spec.train import rewards_of
from tunesmith.store import claims, endings, events, jobs
from tunesmith.store.promotion import Promotion
from tunesmith.work.place import network

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

SILENT_SECONDS = 90.0
"""A worker that has not asked for so long counts as gone: its poll, or its rest, lasts 60 s."""


class Hands:
    """One a server. Methods are called from its event loop."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._boots: dict[str, str] = {}
        """Starts of workers that the house was told of, so that it need not be asked again."""
        self._nudged: set[tuple[str, int, str]] = set()
        self._finishing: dict[tuple[str, int], asyncio.Lock] = {}
        self._network = network()

    def living_workers(self, but: str = "") -> int:
        """Those whose ids begin with `but` are left out."""
        return self._hub.store.read(lambda tx: claims.count_workers(tx, SILENT_SECONDS, but))

    async def greet(self, ask: WorkAsk) -> None:
        """A worker that was started anew has lost what it does not hold: it is queued again.

        One that was started for one job is new in any case.
        """
        if ask.only is not None:
            return
        if self._boots.get(ask.worker_id) == ask.boot_id:
            return
        held = {(attempt.job_id, attempt.fence) for attempt in ask.held}

        def work(tx: Connection) -> list[Job]:
            if not claims.is_new_boot(tx, ask):
                return []
            most = self._hub.settings.max_lapses
            return endings.forget_boot(
                tx, ask.worker_id, held, max_lapses=most, backoff_seconds=0.1
            )

        lost = await self._hub.write(work)
        self._boots[ask.worker_id] = ask.boot_id
        for job in lost:
            log.warning("job %s was lost by worker %s; now %s", job.id, ask.worker_id, job.state)

    async def work_for(self, ask: WorkAsk) -> WorkReply | None:
        """What this worker should do next; None where there is nothing."""
        ask = self._placed(ask)
        has_engines = ask.only is None and self._is_neighbour(ask)
        orders = await self._hub.engines.orders(ask) if has_engines else ()
        nudges = self._nudges(ask)
        attempt = await self._claim(ask)
        if attempt is None and not orders and not nudges:
            return None
        return WorkReply(attempt=attempt, engines=orders, nudges=nudges)

    async def report(self, job_id: str, fence: int, token: str, body: Report) -> Orders:
        """A heartbeat with events. Raises AuthenticationError, FencedError."""
        said = await self._hub.depot.judged(job_id, fence, body)

        def work(tx: Connection) -> Orders:
            claims.check_token(tx, job_id, fence, token)
            if said:
                events.append(tx, job_id, fence, body.worker_id, said)
            return claims.heartbeat(
                tx, job_id, fence, body.worker_id, lease_seconds=self._hub.settings.lease_seconds
            )

        orders = await self._hub.write(work)
        await self._hub.depot.thin(job_id, fence, body.worker_id, said)
        return orders

    def _placed(self, ask: WorkAsk) -> WorkAsk:
        """The question, with a mark that is remembered: whether its worker sees the workspace."""
        is_remote = ask.house_id not in (None, self._hub.house_id)
        return ask.model_copy(update={"host": {**ask.host, "is_remote": is_remote}})

    def _is_neighbour(self, ask: WorkAsk) -> bool:
        """Whether its engines' loopback addresses can be reached from here."""
        return not ask.host["is_remote"] and ask.network in (None, self._network or None)

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
        """The slow part of a promotion is done before the transaction, its clearing away after."""
        moving = self._promotion(job_id, told)
        if moving is None:
            return await self._write_end(job_id, fence, told, None)
        try:
            await asyncio.to_thread(moving.stage)
            return await self._write_end(job_id, fence, told, lambda _: str(moving.swap()))
        finally:
            await asyncio.to_thread(moving.close)

    async def _write_end(
        self, job_id: str, fence: int, told: Outcome, promote: endings.Promote | None
    ) -> Job:
        def work(tx: Connection) -> Job:
            return endings.finish(
                tx,
                job_id,
                fence,
                told,
                promote=promote,
                max_lapses=self._hub.settings.max_lapses,
                backoff_seconds=self._hub.settings.backoff_seconds,
            )

        return await self._hub.write(work)

    def _promotion(self, job_id: str, outcome: Outcome) -> Promotion | None:
        """For an attempt that succeeded and was not ended otherwise before."""
        job = self._hub.store.read(lambda tx: jobs.get(tx, job_id))
        if outcome.kind != "succeeded" or job.state.is_final:
            return None
        assert outcome.artifact
        assert outcome.manifest_sha256
        return Promotion(
            Path(outcome.artifact),
            Path(job.output_dir),
            manifest_sha256=outcome.manifest_sha256,
            journal=self._hub.settings.home / "promotions",
        )

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
        return Assignment(
            job_id=job.id,
            fence=claimed.fence,
            token=claimed.token,
            spec=job.spec,
            inputs=_inputs(job, self._networks(job)),
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
            workspace=str(self._hub.workspace),
            is_remote=bool(ask.host.get("is_remote")),
        )

    def _networks(self, job: Job) -> tuple[str, ...]:
        has_service = bool(services_in(rewards_of(job.spec)))
        return tuple(map(str, self._hub.webhooks.open_networks())) if has_service else ()

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
            self._hub.depot.bring_here(artifact)
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


def _inputs(job: Job, networks: tuple[str, ...]) -> Inputs:
    return Inputs(
        model=job.model.path,
        dataset=job.dataset.path,
        eval_dataset=None if job.eval_dataset is None else job.eval_dataset.path,
        reward_models={one.name: one.path for one in job.reward_models},
        networks=networks,
        tokenizer=None if job.tokenizer is None else job.tokenizer.path,
    )


def _unplaced(outcome: Outcome, refusal: Exception) -> Outcome:
    """The model is made, but cannot go where it should: it stays in its attempt's folder."""
    return Outcome(
        kind="failed",
        step=outcome.step,
        failure_class=FailureClass.USER_ERROR,
        message=f"the model could not be put in its place: {refusal}; it is at {outcome.artifact}",
    )

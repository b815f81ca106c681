"""A job from the worker's side, while it is held: claim, heartbeat, token."""

import hashlib
import hmac
import math
import secrets as random
from dataclasses import dataclass
from functools import cache

from sqlalchemy import ColumnElement, Select, and_, bindparam, func, insert, or_, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import AuthenticationError
from tunesmith.spec.hands import MAX_WAITING, Capacity, Orders, WaitingJob, WorkAsk
from tunesmith.spec.records import CheckpointRow, Job, JobState, Needs, StopMode
from tunesmith.store import events, reservations, rows
from tunesmith.store.tables import (
    HELD,
    UNFINISHED,
    attempts,
    is_held,
    jobs,
    now,
    secrets,
    workers,
)

FRESH_SECONDS = 15.0
"""An idle worker's row is written again after so long."""
_ATTEMPT = select(attempts).where(
    attempts.c.job_id == bindparam("job"), attempts.c.fence == bindparam("of")
)
_TOKEN = _ATTEMPT.with_only_columns(attempts.c.token_sha256)
_CLAIM = select(attempts).where(
    attempts.c.worker_id == bindparam("by"), attempts.c.claim_id == bindparam("claim")
)
_SECRET = select(secrets.c.value).where(secrets.c.name == "attempts")


@dataclass(frozen=True)
class Claimed:
    """An attempt, as its worker is told of it."""

    job: Job
    fence: int
    token: str
    gpus: tuple[int, ...]
    checkpoints: tuple[CheckpointRow, ...]
    """Newest first."""
    first_event_n: int


def claim(tx: Connection, ask: WorkAsk, *, lease_seconds: float) -> Claimed | None:
    """Give the worker the next job that fits it, with a fence of its own.

    Next is the highest priority, then the oldest, among those that are validated and due. Asked
    again with the same `claim_id`, the same attempt comes back, or None once it is over.
    """
    if ask.only is None:
        seen_worker(tx, ask)
    replayed = _find_claim(tx, ask)
    if replayed is not None:
        return _repeat(tx, replayed)
    free = reservations.room(tx, ask.worker_id, ask.capacity)
    candidate = _next_fitting(tx, free, ask.only)
    if candidate is None:
        return None
    gpus = free.gpus[: candidate["needs_gpus"]]
    row = rows.change(
        tx,
        candidate["id"],
        and_(_is_claimable(), jobs.c.fence == candidate["fence"]),
        [("claimed", {"worker_id": ask.worker_id, "gpus": list(gpus)})],
        state=JobState.STARTING.value,
        fence=jobs.c.fence + 1,
        attempts=jobs.c.attempts + 1,
        worker_id=ask.worker_id,
        lease_until=now() + lease_seconds,
        requeue_reason=None,
        should_checkpoint=False,
    )
    return None if row is None else _open_attempt(tx, row, ask, gpus)


def may_claim(tx: Connection, ask: WorkAsk) -> bool:
    """Whether `claim` would bring something: a look without a lock, for an idle worker's poll.

    Also true now and then, so that a claim writes down that the worker is there, and what it has.
    """
    if _find_claim(tx, ask) is not None or not (ask.only or _is_known(tx, ask)):
        return True
    free = reservations.room(tx, ask.worker_id, ask.capacity)
    return _next_fitting(tx, free, ask.only) is not None


def waiting(tx: Connection, limit: int = MAX_WAITING) -> list[WaitingJob]:
    """Jobs that may be claimed now, in the order in which they would be."""
    query = (
        select(jobs.c.id, jobs.c.needs_gpus, jobs.c.needs_memory_bytes)
        .where(_is_claimable())
        .order_by(jobs.c.priority.desc(), jobs.c.number)
        .limit(limit)
    )
    found = tx.execute(query).tuples()
    return [WaitingJob(job_id=name, gpus=gpus, memory_bytes=size) for name, gpus, size in found]


def _is_claimable() -> ColumnElement[bool]:
    return and_(
        jobs.c.state == JobState.QUEUED.value,
        jobs.c.is_validated.is_(True),
        jobs.c.not_before <= now(),
    )


def _next_fitting(
    tx: Connection, free: reservations.Room, only: str | None = None
) -> RowMapping | None:
    if not free.slots and not free.gpus:
        return None
    asked = {"gpus": len(free.gpus), "memory": free.memory_bytes, "only": only}
    query = _fitting(free.slots > 0, only is not None)
    return tx.execute(query, asked).mappings().first()


@cache
def _fitting(has_slots: bool, is_one: bool) -> Select[tuple[str, int, int]]:
    """The next job for so many `gpus` and so much `memory`; with `is_one`, the job `only`."""
    on_gpus = and_(jobs.c.needs_gpus > 0, jobs.c.needs_gpus <= bindparam("gpus"))
    on_cpu = and_(jobs.c.needs_gpus == 0, jobs.c.needs_memory_bytes <= bindparam("memory"))
    fits = or_(on_gpus, on_cpu) if has_slots else on_gpus
    query = (
        select(jobs.c.id, jobs.c.fence, jobs.c.needs_gpus)
        .where(_is_claimable(), fits)
        .order_by(jobs.c.priority.desc(), jobs.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return query.where(jobs.c.id == bindparam("only")) if is_one else query


def _open_attempt(tx: Connection, row: RowMapping, ask: WorkAsk, gpus: tuple[int, ...]) -> Claimed:
    job = rows.to_job(row)
    token = _token(tx, job.id, job.fence, ask.claim_id)
    rows.close_attempts(tx, job.id)
    tx.execute(
        insert(attempts).values(claimed_at=now()),
        {
            "job_id": job.id,
            "fence": job.fence,
            "worker_id": ask.worker_id,
            "claim_id": ask.claim_id,
            "token_sha256": hashlib.sha256(token.encode()).hexdigest(),
            "gpus": list(gpus),
        },
    )
    reservations.reserve(tx, ask.worker_id, f"job:{job.id}", job.needs, gpus)
    return Claimed(job, job.fence, token, gpus, tuple(events.checkpoints(tx, job.id)), 1)


def _find_claim(tx: Connection, ask: WorkAsk) -> RowMapping | None:
    asked = {"by": ask.worker_id, "claim": ask.claim_id}
    return tx.execute(_CLAIM, asked).mappings().first()


def _repeat(tx: Connection, attempt: RowMapping) -> Claimed | None:
    job = rows.to_job(rows.find(tx, attempt["job_id"]))
    fence = attempt["fence"]
    if job.fence != fence or job.state.value not in HELD:
        return None
    return Claimed(
        job,
        fence,
        _token(tx, job.id, fence, attempt["claim_id"]),
        tuple(attempt["gpus"]),
        tuple(events.checkpoints(tx, job.id)),
        attempt["last_n"] + 1,
    )


def _is_known(tx: Connection, ask: WorkAsk) -> bool:
    """Whether the worker's row is fresh."""
    query = select(workers.c.id).where(
        workers.c.id == ask.worker_id, workers.c.seen_at > now() - FRESH_SECONDS
    )
    return tx.scalar(query) is not None


def is_new_boot(tx: Connection, ask: WorkAsk) -> bool:
    """Write down which start of its the worker speaks for; whether that is news to the house."""
    known = select(workers.c.boot_id).where(workers.c.id == ask.worker_id).with_for_update()
    before = tx.scalar(known)
    if before == ask.boot_id:
        return False
    if before is None:
        seen_worker(tx, ask)
    tx.execute(update(workers).where(workers.c.id == ask.worker_id).values(boot_id=ask.boot_id))
    return True


def count_workers(tx: Connection, within_seconds: float, but: str = "") -> int:
    """Workers that asked lately, without those whose ids begin with `but`."""
    lately = workers.c.seen_at >= now() - within_seconds
    if but:
        lately = and_(lately, workers.c.id.not_like(f"{but}%"))
    return tx.scalar(select(func.count()).select_from(workers).where(lately)) or 0


def seen_worker(tx: Connection, ask: WorkAsk) -> None:
    """Remember what the worker has, and that it asked just now."""
    values = {"capacity": ask.capacity.model_dump(mode="json"), "host": ask.host}
    known = update(workers).where(workers.c.id == ask.worker_id).values(**values, seen_at=now())
    if not tx.execute(known).rowcount:
        rows.add_once(tx, workers, {"id": ask.worker_id, **values, "seen_at": now()})


def known_workers(tx: Connection, within_seconds: float = 120) -> dict[str, Capacity]:
    """Workers that asked lately, with what they have."""
    query = select(workers.c.id, workers.c.capacity).where(
        workers.c.seen_at >= now() - within_seconds
    )
    return {name: Capacity.model_validate(found) for name, found in tx.execute(query)}


def unfit(tx: Connection, needs: Needs, within_seconds: float = 120) -> bool:
    """Whether workers are known and none could ever take it."""
    known = known_workers(tx, within_seconds).values()
    return bool(known) and not any(reservations.fits_at_most(needs, one) for one in known)


def check_token(tx: Connection, job_id: str, fence: int, token: str) -> None:
    """Raises AuthenticationError where `token` is not the one of that attempt."""
    expected = tx.scalar(_TOKEN, {"job": job_id, "of": fence}) or ""
    given = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
    if not hmac.compare_digest(given, expected):
        raise AuthenticationError("this token is not the one of that attempt")


def _token(tx: Connection, job_id: str, fence: int, claim_id: str) -> str:
    """Made from a secret of this database, so that a repeated claim brings it again."""
    key = tx.scalar(_SECRET)
    if key is None:
        rows.add_once(tx, secrets, {"name": "attempts", "value": random.token_bytes(32)})
        key = tx.scalar(_SECRET)
        assert key is not None
    digest = hmac.new(key, f"{job_id}:{fence}:{claim_id}".encode(), hashlib.sha256)
    return "at-" + digest.hexdigest()


def heartbeat(
    tx: Connection, job_id: str, fence: int, worker_id: str, *, lease_seconds: float
) -> Orders:
    """Extend the lease and tell what is wanted. Raises FencedError where the attempt is over.

    The first beat turns starting into running. After a lapse, and before another claim, a beat
    takes the job back: it goes on as if nothing had been, unless its GPUs or its memory were given
    away.
    """
    row = rows.lock(tx, job_id)
    attempt = _own_attempt(tx, job_id, fence, worker_id)
    lines, values = _on_beat(row)
    is_back = bool(lines) and lines[0][0] == "reattached"
    if is_back and not reservations.can_return(tx, worker_id, _needs(row), attempt["gpus"]):
        raise rows.fenced(job_id, fence)
    beaten = rows.change(
        tx,
        job_id,
        and_(rows.is_current(fence), rows.as_seen(row)),
        lines,
        lease_until=now() + lease_seconds,
        worker_id=worker_id,
        **values,
    )
    if beaten is None:
        raise rows.fenced(job_id, fence)
    if is_back:
        reservations.reserve(tx, worker_id, f"job:{job_id}", _needs(row), attempt["gpus"])
    return _orders(tx, beaten, lease_seconds, attempt["last_n"])


def _needs(row: RowMapping) -> Needs:
    return Needs(gpus=row["needs_gpus"], memory_bytes=row["needs_memory_bytes"])


def _on_beat(row: RowMapping) -> tuple[list[rows.Line], dict[str, object]]:
    running = {"state": JobState.RUNNING.value, "requeue_reason": None}
    if row["state"] == JobState.STARTING.value:
        return [("running", {})], {**running, "started_at": started_at()}
    if row["state"] == JobState.QUEUED.value:
        return [("reattached", {})], {**running, "started_at": started_at()}
    return [], {}


def started_at() -> object:
    """When the job first ran."""
    return func.coalesce(jobs.c.started_at, now())


def _own_attempt(tx: Connection, job_id: str, fence: int, worker_id: str) -> RowMapping:
    attempt = tx.execute(_ATTEMPT, {"job": job_id, "of": fence}).mappings().first()
    if attempt is None or attempt["worker_id"] != worker_id:
        raise rows.fenced(job_id, fence)
    return attempt


def _orders(tx: Connection, row: RowMapping, lease_seconds: float, last_n: int) -> Orders:
    stop = None if row["stop_mode"] is None else StopMode(row["stop_mode"])
    left = None
    if row["stop_deadline"] is not None:
        left = max(0.0, row["stop_deadline"] - (tx.scalar(select(now())) or 0.0))
    return Orders(
        stop=stop,
        stop_in_seconds=left,
        should_checkpoint=row["should_checkpoint"],
        lease_seconds=lease_seconds,
        accepted_n=last_n,
    )


def request_checkpoint(tx: Connection, job_id: str, owner: str | None = None) -> Job:
    """Ask a held job for a checkpoint soon; the wish goes with the next one accepted."""
    row = rows.lock(tx, job_id, owner)
    guard = is_held()
    return rows.to_job(rows.change(tx, job_id, guard, [], should_checkpoint=True) or row)


def grant_grace(
    tx: Connection,
    lease_seconds: float,
    *,
    grace_seconds: float = math.inf,
    backoff_seconds: float = math.inf,
) -> int:
    """Make every lease last for `lease_seconds` from now: said by an API that was away, and where
    the clock was set. Returns how many there are.

    Nothing waits for longer than it could have been told to: `grace_seconds` to stop,
    `backoff_seconds` to be tried again.
    """
    held = update(jobs).where(is_held()).values(lease_until=now() + lease_seconds)
    count = tx.execute(held).rowcount
    for column, most in (
        (jobs.c.stop_deadline, grace_seconds),
        (jobs.c.not_before, backoff_seconds),
    ):
        if math.isfinite(most):
            late = and_(jobs.c.state.in_(UNFINISHED), column > now() + most)
            tx.execute(update(jobs).where(late).values({column: now() + most}))
    return count


def set_back(tx: Connection) -> None:
    """Nobody was seen in the future: said where the clock was set back."""
    tx.execute(update(workers).where(workers.c.seen_at > now()).values(seen_at=now()))

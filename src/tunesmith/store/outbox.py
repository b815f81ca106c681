"""Webhook messages owed: rows written with the state that they tell of, sent until taken.

All messages of one job to one endpoint share their `due_at`, and only the oldest of them is ever
given out: so they arrive in order. Whoever holds one has put that time to the end of its lease.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.store.tables import now, outbox, touch, webhook_endpoints

TOPIC = "outbox"
TYPES = {
    state: f"fine_tuning.job.{state}" for state in ("succeeded", "failed", "cancelled", "paused")
}
"""State of a job → the type of the event that tells of it."""
GIVE_UP_SECONDS = 24 * 3600.0
KEPT_SECONDS = 30 * 24 * 3600.0
"""After its end, a message can be looked at and sent again for so long."""


@dataclass(frozen=True)
class Message:
    """One message, given out to be sent."""

    number: int
    id: str
    """The same for every try; the receiver's key against doubles."""
    endpoint_id: str
    url: str
    body: str
    secrets: tuple[str, ...] = field(repr=False)
    """To sign with: the endpoint's, and the one before while it still counts."""
    tries: int
    """This one included."""


@dataclass(frozen=True)
class Lane:
    """An endpoint that is owed something."""

    endpoint_id: str
    wait_seconds: float
    """Until the first is due; 0 or less: now."""


_LISTENING = select(webhook_endpoints.c.id, webhook_endpoints.c.event_types, now()).where(
    webhook_endpoints.c.owner == bindparam("by"), webhook_endpoints.c.disabled_at.is_(None)
)
_IS_OWED = outbox.c.done_at.is_(None)
_SAME_JOB = and_(
    outbox.c.endpoint_id == bindparam("of_endpoint"), outbox.c.job_id == bindparam("of_job")
)
_ADD = insert(outbox).values(
    due_at=func.coalesce(
        select(func.max(outbox.c.due_at)).where(_SAME_JOB, _IS_OWED).scalar_subquery(), now()
    ),
    give_up_at=now() + GIVE_UP_SECONDS,
)


def owe(tx: Connection, job: RowMapping) -> None:
    """Write what the owner's endpoints want to hear of the state that the job has just taken."""
    kind = TYPES[job["state"]]
    for endpoint_id, wanted, at in tx.execute(_LISTENING, {"by": job["owner"]}).all():
        if kind not in wanted:
            continue
        event_id = f"evt_{job['id']}{job['last_seq']:08x}"
        tx.execute(
            _ADD,
            {
                "id": event_id,
                "endpoint_id": endpoint_id,
                "job_id": job["id"],
                "body": body(event_id, int(at), kind, job["id"]),
                "created_at": at,
                "of_endpoint": endpoint_id,
                "of_job": job["id"],
            },
        )
        touch(tx, TOPIC)


def body(event_id: str, created_at: int, kind: str, job_id: str) -> str:
    """What is sent, byte for byte, at every try."""
    told = {
        "id": event_id,
        "object": "event",
        "created_at": created_at,
        "type": kind,
        "data": {"id": f"ftjob-{job_id}"},
    }
    return json.dumps(told, separators=(",", ":"))


def lanes(tx: Connection) -> list[Lane]:
    """Every endpoint that is owed something: one look into an index for each endpoint."""
    endpoint = webhook_endpoints.c
    first = select(func.min(outbox.c.due_at)).where(outbox.c.endpoint_id == endpoint.id, _IS_OWED)
    wait = (first.scalar_subquery() - now()).label("wait")
    found = tx.execute(select(endpoint.id, wait).where(endpoint.disabled_at.is_(None)))
    return [Lane(endpoint_id, seconds) for endpoint_id, seconds in found if seconds is not None]


def claim(
    tx: Connection, endpoint_id: str, holder: str, count: int, lease_seconds: float
) -> list[Message]:
    """Take up to `count` messages that are due, of as many jobs: each the oldest of its job."""
    earlier = outbox.alias()
    has_earlier = exists().where(
        earlier.c.endpoint_id == outbox.c.endpoint_id,
        earlier.c.job_id == outbox.c.job_id,
        earlier.c.done_at.is_(None),
        earlier.c.number < outbox.c.number,
    )
    query = (
        select(outbox.c.number, outbox.c.job_id)
        .where(outbox.c.endpoint_id == endpoint_id, _IS_OWED, outbox.c.due_at <= now())
        .where(~has_earlier)
        .order_by(outbox.c.due_at, outbox.c.number)
        .limit(count)
        .with_for_update(skip_locked=True)
    )
    taken = tx.execute(query).all()
    if not taken:
        return []
    numbers, job_ids = [row[0] for row in taken], [row[1] for row in taken]
    of_jobs = and_(outbox.c.endpoint_id == endpoint_id, outbox.c.job_id.in_(job_ids), _IS_OWED)
    tx.execute(update(outbox).where(of_jobs).values(due_at=now() + lease_seconds))
    held = update(outbox).where(outbox.c.number.in_(numbers))
    tx.execute(held.values(holder=holder, tries=outbox.c.tries + 1))
    return _messages(tx, numbers)


def _messages(tx: Connection, numbers: list[int]) -> list[Message]:
    endpoint = webhook_endpoints.c
    is_valid = endpoint.old_secret_until > now()
    query = (
        select(
            *(outbox.c.number, outbox.c.id, outbox.c.endpoint_id, outbox.c.body, outbox.c.tries),
            *(endpoint.url, endpoint.secret, case((is_valid, endpoint.old_secret)).label("old")),
        )
        .join(webhook_endpoints, endpoint.id == outbox.c.endpoint_id)
        .where(outbox.c.number.in_(numbers))
        .order_by(outbox.c.number)
    )
    found = []
    for row in tx.execute(query).mappings():
        values = dict(row)
        keys = (values.pop("secret"), values.pop("old"))
        found.append(Message(**values, secrets=tuple(key for key in keys if key)))
    return found


def record_taken(tx: Connection, message: Message, holder: str, status: int) -> bool:
    """It was taken. False where another holds it by now, and nothing was changed."""
    return _settle(tx, message, holder, now(), done_at=now(), status=status, error=None)


def postpone(
    tx: Connection,
    message: Message,
    holder: str,
    wait_seconds: float,
    status: int | None,
    error: str,
) -> bool:
    """It was not taken: it is tried again, or given up where its time is over."""
    done = case((outbox.c.give_up_at <= now(), now()))
    last_try = case(
        (outbox.c.give_up_at <= now(), now()),
        (outbox.c.give_up_at < now() + wait_seconds, outbox.c.give_up_at),
        else_=now() + wait_seconds,
    )
    return _settle(tx, message, holder, last_try, done_at=done, status=status, error=error)


def _settle(
    tx: Connection, message: Message, holder: str, due_at: ColumnElement[float], **values: Any
) -> bool:
    is_held = and_(outbox.c.number == message.number, outbox.c.holder == holder, _IS_OWED)
    settled = update(outbox).where(is_held).values(holder=None, due_at=due_at, **values)
    row = tx.execute(settled.returning(outbox.c.job_id, outbox.c.due_at)).first()
    if row is None:
        return False
    followers = and_(
        outbox.c.endpoint_id == message.endpoint_id, outbox.c.job_id == row[0], _IS_OWED
    )
    tx.execute(update(outbox).where(followers).values(due_at=row[1]))
    touch(tx, TOPIC)
    return True


def drop_owed(tx: Connection, endpoint_id: str, error: str) -> None:
    """Give up all that an endpoint is owed."""
    is_its = and_(outbox.c.endpoint_id == endpoint_id, _IS_OWED)
    tx.execute(update(outbox).where(is_its).values(done_at=now(), holder=None, error=error))


def release(tx: Connection, holder: str | None) -> None:
    """Give back what a process holds (None: whoever does), so that nobody waits for its lease."""
    is_held = outbox.c.holder.is_not(None) if holder is None else outbox.c.holder == holder
    jobs = select(outbox.c.endpoint_id, outbox.c.job_id).where(is_held, _IS_OWED).distinct()
    for endpoint_id, job_id in tx.execute(jobs).all():
        is_its = and_(outbox.c.endpoint_id == endpoint_id, outbox.c.job_id == job_id, _IS_OWED)
        tx.execute(update(outbox).where(is_its).values(due_at=now(), holder=None))
        touch(tx, TOPIC)


def sweep(tx: Connection) -> int:
    """Forget messages long done, and those of endpoints that are gone. Returns how many.

    One that waits for longer than it can was dated by a clock that has stepped: it is due now.
    """
    is_old = outbox.c.done_at < now() - KEPT_SECONDS
    has_endpoint = exists().where(webhook_endpoints.c.id == outbox.c.endpoint_id)
    astray = and_(_IS_OWED, outbox.c.due_at > now() + 2 * GIVE_UP_SECONDS)
    tx.execute(update(outbox).where(astray).values(due_at=now()))
    return tx.execute(delete(outbox).where(or_(is_old, ~has_endpoint))).rowcount

"""What goes over an event stream, as bytes: events, resets, farewells, pages of history."""

import random
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.store import history

CHUNK_BYTES = 32 << 10
"""Sent at once; one event may be longer."""
PAGE_EVENTS = 128
RETRY_MS = 1000
KEEP_ALIVE = b": keep-alive\n\n"
OPENING = b"retry: %d\n\n" % RETRY_MS
Page = tuple[bytes, int]
"""Frames, and the number of the last event among them."""


def frame(job_id: str, event: RowMapping) -> bytes:
    """An event's number and job as `id:`, one line of JSON as `data:`."""
    body = {name: event[name] for name in ("seq", "fence", "at", "type", "data")}
    return b"id: %d-%s\ndata: %s\n\n" % (event["seq"], job_id.encode(), msgspec.json.encode(body))


def reset(job_id: str, after: int, snapshot: Mapping[str, Any]) -> bytes:
    """What was asked for is not there: how the job stands now; number `after` + 1 comes next."""
    body = msgspec.json.encode(snapshot)
    return b"id: %d-%s\nevent: reset\ndata: %s\n\n" % (after, job_id.encode(), body)


def closing() -> bytes:
    """Come back soon, not all at once."""
    pause = RETRY_MS + random.randrange(2 * RETRY_MS)
    return b"retry: %d\nevent: server_closing\ndata: {}\n\n" % pause


def page(tx: Connection, job_id: str, seq: int) -> Page:
    """The next frames after `seq` from the table; a gap before them is told of."""
    parts: list[bytes] = []
    size, last = 0, seq
    for row in history.rows_after(tx, job_id, seq, PAGE_EVENTS):
        if not parts and row["seq"] != seq + 1:
            parts.append(reset(job_id, row["seq"] - 1, history.standing(tx, job_id)))
        parts.append(frame(job_id, row))
        size, last = size + len(parts[-1]), row["seq"]
        if size >= CHUNK_BYTES:
            break
    if not parts:  # all of it was cleared away
        snapshot = history.standing(tx, job_id)
        last = max(seq, snapshot["last_seq"])
        parts.append(reset(job_id, last, snapshot))
    return b"".join(parts), last


def starting_point(text: str | None, snapshot: Mapping[str, Any]) -> Page:
    """What to say first to a reader who shows its last `id:`, and the number to go on after.

    A number alone is this job's. For what is no number of this job's, or of events that are no
    longer kept, a reset comes first, and then the oldest event that there is.
    """
    job_id, before = snapshot["job_id"], snapshot["first_seq"] - 1
    seq = _number(text or "0", job_id)
    if seq is not None and before <= seq <= snapshot["last_seq"]:
        return b"", seq
    return reset(job_id, before, snapshot), before


def _number(text: str, job_id: str) -> int | None:
    digits, dash, owner = text.partition("-")
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= 18
    return int(digits) if is_number and (not dash or owner == job_id) else None

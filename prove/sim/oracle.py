"""What must hold whatever happens, judged without the guards: from who was answered what, and from
rows read as plain SQL.

It keeps its own books: which attempt was claimed last, until when its lease lasts, which words were
acknowledged, what a user was told. A difference is a violation, told in a sentence.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Rows = Callable[[str], list[tuple[Any, ...]]]
"""Runs plain SQL."""
FINAL = ("succeeded", "failed", "cancelled")
HELD = ("starting", "running", "stopping")
_ENDS = {"succeeded", "failed", "cancelled", "paused", "queued"}
_LOST = {"queued", "failed", "cancelled", "paused"}
MOVES: dict[str, dict[str, set[str]]] = {
    "claim": {"queued": {"starting"}},
    "report": {"starting": {"running"}, "queued": {"running"}},
    "finish": dict.fromkeys((*HELD, "queued"), _ENDS),
    "reap": dict.fromkeys(HELD, _LOST),
    "forget": dict.fromkeys(HELD, _LOST),
    "stop": {
        "queued": {"cancelled", "paused"},
        "paused": {"cancelled"},
        "starting": {"stopping"},
        "running": {"stopping"},
    },
    "resume": {"paused": {"queued"}},
    "validate": {"queued": {"failed"}},
}
"""What each act may do to a job's state; staying as it was is always allowed."""


@dataclass
class Attempt:
    """One claim as its worker lives it, real or a zombie."""

    serial: int
    job_id: str
    fence: int
    token: str
    worker_id: str
    boot: int
    gpus: tuple[int, ...]
    first_n: int
    claim_id: str
    memory_bytes: int = 0


@dataclass
class Book:
    """The oracle's own knowledge of one job."""

    owner: str
    priority: int
    number: int
    needs_gpus: int
    memory_bytes: int
    state: str = "queued"
    owner_attempt: int = 0
    """Serial of the last claim."""
    is_out: bool = False
    """Whether that attempt still counts: not ended, given back or taken away."""
    was_lapsed: bool = False
    lease_until: float = 0.0
    stop_asked: str | None = None
    stop_deadline: float = 0.0
    is_valid: bool = True
    due: float = 0.0
    in_vain: int = 0
    """Attempts lost in a row without a new checkpoint."""
    seq: int = 0
    fence_seen: int = 0
    promoted: list[int] = field(default_factory=list)
    """Serials of the attempts whose artifact was moved to its place."""
    checkpoints: dict[str, int] = field(default_factory=dict)


class Oracle:
    def __init__(self, clock: Callable[[], float], lease_seconds: float, max_lapses: int) -> None:
        self.now, self.lease, self.max_lapses = clock, lease_seconds, max_lapses
        self.books: dict[str, Book] = {}
        self.faults: list[str] = []
        self.said: dict[str, dict[int, int]] = defaultdict(dict)
        """By job: marks of the words that were acknowledged, with the serial of who said them."""
        self.seen: dict[str, dict[int, int]] = defaultdict(dict)
        """By job: how often a mark stands in the table."""
        self.claims: dict[tuple[str, str], int] = {}
        self.live: dict[int, Attempt] = {}

    def fault(self, sentence: str) -> None:
        self.faults.append(f"{sentence} (at {self.now():.1f} s)")

    # what was answered

    def submitted(self, book: Book, job_id: str) -> None:
        if job_id in self.books:
            self.fault(f"{job_id}: submitted twice")
        book.seq = 0
        self.books[job_id] = book

    def claimed(self, attempt: Attempt) -> None:
        """A new attempt was given out."""
        book = self.books[attempt.job_id]
        key = (attempt.worker_id, attempt.claim_id)
        if key in self.claims:
            self.fault(f"{attempt.job_id}: a claim id was answered with two attempts")
        self.claims[key] = attempt.serial
        if book.state in FINAL:
            self.fault(f"{attempt.job_id}: claimed after its end")
        if book.state == "paused":
            self.fault(f"{attempt.job_id}: claimed while paused")
        if book.is_out:
            self.fault(f"{attempt.job_id}: claimed while another attempt holds it")
        if not book.is_valid:
            self.fault(f"{attempt.job_id}: claimed before its check")
        if self.now() < book.due - 1e-6:
            self.fault(f"{attempt.job_id}: claimed before its back-off was over")
        if attempt.fence <= book.fence_seen:
            self.fault(f"{attempt.job_id}: the fence did not grow at a claim")
        book.fence_seen = attempt.fence
        book.owner_attempt, book.is_out, book.was_lapsed = attempt.serial, True, False
        book.lease_until = self.now() + self.lease
        self.live = {k: v for k, v in self.live.items() if v.job_id != attempt.job_id}
        self._check_devices(attempt)
        self.live[attempt.serial] = attempt

    def _check_devices(self, attempt: Attempt) -> None:
        for other in self.live.values():
            if other.worker_id == attempt.worker_id and set(other.gpus) & set(attempt.gpus):
                self.fault(f"{attempt.job_id}: its GPU is {other.job_id}'s")

    def check_room(self, worker_id: str, slots: int, memory_bytes: int) -> None:
        mine = [one for one in self.live.values() if one.worker_id == worker_id and not one.gpus]
        if len(mine) > slots:
            self.fault(f"{worker_id}: {len(mine)} jobs on {slots} slots")
        if sum(one.memory_bytes for one in mine) > memory_bytes:
            self.fault(f"{worker_id}: more memory given out than it has")

    def first_in_line(self, job_id: str, waiting: Iterable[tuple[str, int, int]]) -> None:
        """`waiting`: id, priority, number of every job that might have been claimed instead."""
        best = min(waiting, key=lambda one: (-one[1], one[2]), default=None)
        if best is not None and best[0] != job_id:
            self.fault(f"{job_id}: claimed before {best[0]}, whose turn it was")

    def accepted(self, attempt: Attempt, what: str) -> None:
        """A write of this attempt was taken: only the last claim's may be."""
        book = self.books[attempt.job_id]
        if book.owner_attempt != attempt.serial:
            self.fault(f"{attempt.job_id}: {what} of a fenced attempt was taken")
        if not book.is_out and not book.was_lapsed:
            self.fault(f"{attempt.job_id}: {what} of an ended attempt was taken")

    def beaten(self, attempt: Attempt) -> None:
        self.accepted(attempt, "a report")
        book = self.books[attempt.job_id]
        book.is_out, book.was_lapsed = True, False
        self.live[attempt.serial] = attempt
        book.lease_until = self.now() + self.lease

    def acknowledged(self, attempt: Attempt, event: dict[str, Any]) -> None:
        """The worker was told that this word is stored."""
        book = self.books[attempt.job_id]
        if event["type"] == "step":
            self.said[attempt.job_id].setdefault(event["tokens"], attempt.serial)
        if event["type"] == "checkpointed":
            if event["step"] > max(book.checkpoints.values(), default=0):
                book.in_vain = 0
            book.checkpoints[event["path"]] = event["step"]

    def resumes_from(self, job_id: str, offered: list[tuple[str, int]]) -> None:
        """What a claim brought: every accepted checkpoint, newest first, and no other."""
        book = self.books[job_id]
        if dict(offered) != book.checkpoints:
            self.fault(f"{job_id}: a claim brings other checkpoints than were accepted")
        steps = [step for _, step in offered]
        if steps != sorted(steps, reverse=True):
            self.fault(f"{job_id}: checkpoints are not newest first")

    def refused(self, attempt: Attempt, what: str) -> None:
        """Fenced: wrong where the attempt holds the job and its lease has not lapsed."""
        book = self.books[attempt.job_id]
        if book.owner_attempt == attempt.serial and book.is_out:
            self.fault(f"{attempt.job_id}: {what} of the attempt that holds it was refused")

    def ended(self, attempt: Attempt, kind: str, state: str, is_lapse: bool) -> None:
        self.accepted(attempt, "an end")
        book = self.books[attempt.job_id]
        if state == "succeeded" and kind != "succeeded":
            self.fault(f"{attempt.job_id}: succeeded by an outcome {kind}")
        if book.stop_asked in ("cancel", "force") and state != "cancelled":
            self.fault(f"{attempt.job_id}: a cancel was acknowledged, and it ended {state}")
        if book.stop_asked == "pause" and state == "queued":
            self.fault(f"{attempt.job_id}: a pause was acknowledged, and it waits to run")
        self.given_up(attempt.job_id, in_vain=is_lapse)

    def given_up(self, job_id: str, in_vain: bool) -> None:
        book = self.books[job_id]
        book.is_out = book.was_lapsed = False
        book.in_vain += in_vain
        self.live.pop(book.owner_attempt, None)

    def promoted(self, job_id: str, serial: int) -> None:
        book = self.books[job_id]
        if serial != book.owner_attempt:
            self.fault(f"{job_id}: the artifact of a fenced attempt was put in its place")
        if book.stop_asked in ("cancel", "force"):
            self.fault(f"{job_id}: promoted after an acknowledged cancel")
        book.promoted.append(serial)

    def stop_told(self, job_id: str, mode: str, grace: float) -> None:
        """A user asked for a stop of a held job and was told it was taken."""
        book = self.books[job_id]
        book.stop_asked = mode
        book.stop_deadline = self.now() + grace

    def taken_back(self, job_id: str, state: str, overdue_seconds: float) -> None:
        """By the reaper."""
        book = self.books[job_id]
        is_overdue = (
            book.stop_asked is not None and self.now() > book.stop_deadline + overdue_seconds
        )
        if book.is_out and self.now() < book.lease_until - 1e-6 and not is_overdue:
            self.fault(f"{job_id}: a live lease was reaped")
        self._lost(job_id, state)

    def forgotten(self, job_id: str, state: str, worker_id: str, held: set[int]) -> None:
        """A worker that was started anew gave up what it does not hold."""
        book = self.books[job_id]
        attempt = self.live.get(book.owner_attempt)
        if attempt is not None and attempt.worker_id != worker_id:
            self.fault(f"{job_id}: taken from {attempt.worker_id} at the start of {worker_id}")
        if book.owner_attempt in held:
            self.fault(f"{job_id}: taken from a worker that holds it")
        self._lost(job_id, state)

    def _lost(self, job_id: str, state: str) -> None:
        book = self.books[job_id]
        asked = book.stop_asked
        if asked in ("cancel", "force") and state != "cancelled":
            self.fault(f"{job_id}: a cancel was acknowledged, and it became {state}")
        if asked == "pause" and state != "paused":
            self.fault(f"{job_id}: a pause was acknowledged, and it became {state}")
        self.given_up(job_id, in_vain=asked is None)
        book.was_lapsed = state == "queued"

    def grace(self) -> None:
        """A server said at its start that workers have time to come back."""
        for book in self.books.values():
            if book.is_out:
                book.lease_until = self.now() + self.lease

    # what stands in the tables

    def look(self, rows_of: Rows, act: str) -> None:
        """After every act: the rows against the books."""
        rows = rows_of("select id, state, last_seq, owner, lapses, artifact from jobs")
        if len(rows) != len(self.books):
            self.fault(f"{len(rows)} jobs stand in the table, {len(self.books)} were accepted")
        unfinished: dict[str, int] = defaultdict(int)
        for job_id, state, last_seq, owner, lapses, artifact in rows:
            book = self.books.get(job_id)
            if book is None:
                continue
            unfinished[owner] += state not in FINAL
            self._moved(job_id, book, state, act)
            self._count(job_id, book, lapses, state)
            if (state == "succeeded") != bool(book.promoted) or bool(artifact) != bool(
                book.promoted
            ):
                self.fault(f"{job_id}: {state}, and its artifact was promoted: {book.promoted}")
            if last_seq != book.seq:
                self._read_events(rows_of, job_id, book, last_seq)
        told: dict[str, int] = dict(rows_of("select owner, unfinished from quotas"))
        if {k: v for k, v in told.items() if v} != {k: v for k, v in unfinished.items() if v}:
            self.fault(f"quotas say {told}, the jobs {dict(unfinished)}")

    def _moved(self, job_id: str, book: Book, state: str, act: str) -> None:
        if state == book.state:
            return
        if state not in MOVES.get(act, {}).get(book.state, set()):
            self.fault(f"{job_id}: {act} moved it from {book.state} to {state}")
        if state in ("queued", "paused", *FINAL):
            book.stop_asked = None
        if state == "cancelled":
            book.stop_asked = "cancel"
        book.state = state

    def _count(self, job_id: str, book: Book, lapses: int, state: str) -> None:
        if state == "queued" and book.in_vain >= self.max_lapses:
            self.fault(f"{job_id}: tried again after {book.in_vain} attempts in vain")
        if state in HELD and lapses > book.in_vain:
            self.fault(f"{job_id}: {lapses} lapses are counted, {book.in_vain} were seen")

    def _read_events(self, rows_of: Rows, job_id: str, book: Book, last_seq: int) -> None:
        found = rows_of(
            "select seq, fence, type, data from events "  # noqa: S608
            f"where job_id = '{job_id}' and seq > {book.seq} order by seq"
        )
        if [row[0] for row in found] != list(range(book.seq + 1, last_seq + 1)):
            self.fault(f"{job_id}: numbers {[row[0] for row in found]} after {book.seq}")
        for _, fence, kind, data in found:
            self._event(job_id, book, fence, kind, data)
        book.seq = last_seq

    def _event(self, job_id: str, book: Book, fence: int, kind: str, data: Any) -> None:
        body = json.loads(data) if isinstance(data, str) else data
        if fence < book.fence_seen and kind not in ("queued", "validated"):
            self.fault(f"{job_id}: {kind} of fence {fence} after {book.fence_seen}")
        if self.seen[job_id].get(-1):
            self.fault(f"{job_id}: {kind} after its last event")
        if kind in FINAL:
            self.seen[job_id][-1] = 1
        if kind == "requeued":
            book.due = self.now() + body["wait_seconds"]
        if kind == "step":
            mark = body["tokens"]
            self.seen[job_id][mark] = self.seen[job_id].get(mark, 0) + 1
            if self.seen[job_id][mark] > 1:
                self.fault(f"{job_id}: word {mark} was stored twice")

    def final(self) -> None:
        """When all is calm again: every job has ended, and every acknowledged word is there."""
        for job_id, book in self.books.items():
            if book.state not in FINAL:
                self.fault(f"{job_id}: lost, still {book.state} when all was calm")
            missing = [mark for mark in self.said[job_id] if mark not in self.seen[job_id]]
            if missing:
                self.fault(f"{job_id}: acknowledged words {missing[:5]} are not there")

"""What must hold of what a house leaves behind: rows, events, files. It reads no guard.

Each rule is a function from the remains to sentences; none is what a good house gives.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from house import House
from prove.fleet import Ledger
from prove.rows import Row, Rows

FINAL = ("succeeded", "failed", "cancelled")
WORDS = ("started", "step", "evaluated", "checkpointed", "notice")
"""Types of events that come from a trainer or its worker."""
Faults = dict[str, list[str]]


@dataclass(frozen=True)
class Remains:
    house: House
    ledger: Ledger
    rows: Rows
    jobs: dict[str, Row]
    events: dict[str, list[Row]]
    """By job, by seq."""
    attempts: dict[str, list[Row]]
    """By job, by fence."""

    @classmethod
    def read(cls, house: House, ledger: Ledger) -> "Remains":
        rows = Rows.of(house)
        jobs = {row["id"]: row for row in rows.ask("select * from jobs order by number")}
        events = rows.ask("select * from events order by job_id, seq")
        attempts = rows.ask("select * from attempts order by job_id, fence")
        return cls(house, ledger, rows, jobs, _by_job(events), _by_job(attempts))

    @property
    def succeeded(self) -> list[Row]:
        return [job for job in self.jobs.values() if job["state"] == "succeeded"]


Rule = Callable[[Remains], Iterator[str]]


def check(remains: Remains) -> Faults:
    """Every rule, with the sentences that it found."""
    faults: Faults = defaultdict(list)
    for name, rule in RULES.items():
        faults[name] = list(rule(remains))
    return faults


def _lost(remains: Remains) -> Iterator[str]:
    """Every accepted job has a row, no other has, and each has ended."""
    accepted = set(remains.ledger.accepted)
    for job_id in sorted(accepted - set(remains.jobs)):
        yield f"{job_id}: accepted, but it has no row"
    for job_id, job in remains.jobs.items():
        if job_id not in accepted:
            yield f"{job_id}: there is a row, but nobody was told of the job"
        if job["state"] not in FINAL:
            yield f"{job_id}: it never ended, it is {job['state']} (attempt {job['fence']})"


def _wrong_end(remains: Remains) -> Iterator[str]:
    """What nobody cancelled succeeds; the row and the last event agree, and nothing follows it."""
    for job_id, job in remains.jobs.items():
        is_cancelled = job_id in remains.ledger.cancelled
        if not is_cancelled and job["state"] in ("failed", "cancelled"):
            yield f"{job_id}: {job['state']}, though nobody cancelled it: {job['error']}"
        ends = [event for event in remains.events[job_id] if event["type"] in FINAL]
        if [event["type"] for event in ends] != [job["state"]]:
            yield f"{job_id}: it is {job['state']}, its ends are {[e['type'] for e in ends]}"
        elif ends[0]["seq"] != job["last_seq"]:
            yield f"{job_id}: something follows its end"


def _cancel(remains: Remains) -> Iterator[str]:
    """A cancel that was acknowledged holds; one that was refused came after another end."""
    for job_id in sorted(remains.ledger.cancelled):
        state = remains.jobs.get(job_id, {}).get("state")
        if state in ("succeeded", "failed"):
            yield f"{job_id}: its cancel was acknowledged, and it {state}"
    for job_id in sorted(remains.ledger.refused - remains.ledger.cancelled):
        state = remains.jobs.get(job_id, {}).get("state")
        if state == "cancelled":
            yield f"{job_id}: its cancel was refused, and it is cancelled"


def _twice(remains: Remains) -> Iterator[str]:
    """One end, by one attempt, which is the last; attempts follow one another."""
    for job_id, job in remains.jobs.items():
        ends = [event for event in remains.events[job_id] if event["type"] in FINAL]
        if len(ends) > 1:
            yield f"{job_id}: it ended {len(ends)} times"
        tried = remains.attempts[job_id]
        won = [row["fence"] for row in tried if (row["outcome"] or {}).get("kind") == "succeeded"]
        if job["state"] == "succeeded" and won != [job["fence"]]:
            yield f"{job_id}: attempts {won} succeeded, the last is {job['fence']}"
        if [row["fence"] for row in tried] != list(range(1, job["fence"] + 1)):
            yield f"{job_id}: the fence is {job['fence']}, its attempts are not 1 to that"
        for before, after in pairwise(tried):
            if before["ended_at"] is None or before["ended_at"] > after["claimed_at"]:
                yield f"{job_id}: attempt {after['fence']} was given out beside the one before"
        claims = [event["fence"] for event in remains.events[job_id] if event["type"] == "claimed"]
        if claims != [row["fence"] for row in tried]:
            yield f"{job_id}: claims told of are {claims}"


def _stale(remains: Remains) -> Iterator[str]:
    """No event of an attempt after one of a later attempt."""
    for job_id, events in remains.events.items():
        newest = 0
        for event in events:
            if event["fence"] < newest:
                yield f"{job_id}: event {event['seq']} is of attempt {event['fence']} < {newest}"
            newest = max(newest, event["fence"])


def _gap(remains: Remains) -> Iterator[str]:
    for job_id, job in remains.jobs.items():
        numbers = [event["seq"] for event in remains.events[job_id]]
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"{job_id}: its events are not numbered 1 to {len(numbers)}"
        if job["last_seq"] != len(numbers):
            yield f"{job_id}: last_seq is {job['last_seq']}, there are {len(numbers)} events"


def _artifact(remains: Remains) -> Iterator[str]:
    """A model is in its place where, and only where, the job succeeded, and it is the last
    attempt's, with every byte as sealed."""
    for job_id, job in remains.jobs.items():
        place = Path(job["output_dir"])
        if job["state"] != "succeeded":
            if place.exists() and any(place.iterdir()):
                yield f"{job_id}: it is {job['state']}, and there is a model at {place}"
            continue
        if job["artifact"] != str(place):
            yield f"{job_id}: the row names {job['artifact']}, its place is {place}"
        outcome = (remains.attempts[job_id] or [{}])[-1].get("outcome") or {}
        for fault in _differences(place, outcome.get("manifest_sha256"), job_id):
            yield f"{job_id}: {fault}"


def _differences(folder: Path, sealed: str | None, job_id: str) -> Iterator[str]:
    try:
        body = (folder / "manifest.json").read_bytes()
        entries = json.loads(body)["files"]
        author = json.loads((folder / "training.json").read_bytes())["job_id"]
    except (OSError, ValueError, KeyError) as error:
        yield f"no whole model at {folder}: {error}"
        return
    if hashlib.sha256(body).hexdigest() != sealed:
        yield "the model in its place is not the one of the last attempt"
    if author != job_id:
        yield f"the model in its place was made by {author}"
    named = {entry["path"]: entry["sha256"] for entry in entries}
    there = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / "manifest.json"
    }
    if named != there:
        yield "the model's files differ from its manifest"


def _words(remains: Remains) -> Iterator[str]:
    """What a trainer said is there once, in order; a step said again by a later attempt is the
    same to the last bit."""
    for job_id, events in remains.events.items():
        losses: dict[int, float] = {}
        last_steps: dict[int, int] = {}
        counts: dict[int, int] = defaultdict(int)
        for event in events:
            counts[event["fence"]] += event["type"] in WORDS
            if event["type"] != "step":
                continue
            step, loss, fence = event["data"]["step"], event["data"]["loss"], event["fence"]
            if step <= last_steps.get(fence, 0):
                yield f"{job_id}: attempt {fence} tells of step {step} after {last_steps[fence]}"
            if losses.setdefault(step, loss) != loss:
                yield f"{job_id}: step {step} has two losses, {losses[step]!r} and {loss!r}"
            last_steps[fence] = step
        for row in remains.attempts[job_id]:
            if counts[row["fence"]] != row["last_n"]:
                told = f"{row['last_n']} words were taken, {counts[row['fence']]} are there"
                yield f"{job_id}: attempt {row['fence']}: {told}"


def _whole_run(remains: Remains) -> Iterator[str]:
    """A job that succeeded went through all its steps, each attempt from a checkpoint of before."""
    for job in remains.succeeded:
        saved = {0}
        for event in remains.events[job["id"]]:
            data = event["data"]
            if event["type"] == "checkpointed":
                saved.add(data["step"])
            if event["type"] == "started" and data["start_step"] not in saved:
                yield f"{job['id']}: attempt {event['fence']} began at {data['start_step']}"
        said = {e["data"]["step"] for e in remains.events[job["id"]] if e["type"] == "step"}
        if said != set(range(1, (job["total_steps"] or 0) + 1)):
            missing = set(range(1, (job["total_steps"] or 0) + 1)) ^ said
            yield f"{job['id']}: of {job['total_steps']} steps, {sorted(missing)[:5]} are not told"


def _devices(remains: Remains) -> Iterator[str]:
    """Nothing stays taken, and no place in a quota stays used."""
    for row in remains.rows.ask("select holder from reservations where holder like 'job:%'"):
        yield f"{row['holder']}: its devices were not let go"
    for row in remains.rows.ask("select owner, unfinished from quotas"):
        unended = sum(
            job["state"] not in FINAL and job["owner"] == row["owner"]
            for job in remains.jobs.values()
        )
        if row["unfinished"] != unended:
            yield f"{row['owner']}: {row['unfinished']} count as unfinished, {unended} are"


def _outbox(remains: Remains) -> Iterator[str]:
    """To each endpoint, one message for each end and each pause that it listens to; all of them
    have come, and no other."""
    endpoints = remains.rows.ask("select id, owner, event_types from webhook_endpoints")
    sent = remains.rows.ask("select id, endpoint_id, job_id, body, done_at from outbox")
    written = Counter((row["endpoint_id"], row["job_id"], row["body"]["type"]) for row in sent)
    owed = Counter(
        (endpoint["id"], job_id, kind)
        for endpoint in endpoints
        for job_id, events in remains.events.items()
        for kind in (f"fine_tuning.job.{event['type']}" for event in events)
        if kind in endpoint["event_types"] and remains.jobs[job_id]["owner"] == endpoint["owner"]
    )
    for key in sorted(set(owed) | set(written)):
        if owed[key] != written[key]:
            yield f"{key}: {owed[key]} messages are owed, {written[key]} were written"
    ids = [row["id"] for row in sent]
    if remains.ledger.heard != set(ids):
        yield f"{len(set(ids) ^ remains.ledger.heard)} messages differ from those that came"
    yield from (f"{row['id']}: still owed" for row in sent if row["done_at"] is None)


def _leftovers(remains: Remains) -> Iterator[str]:
    """No promotion half done, no outcome undelivered, nothing half-copied beside the models."""
    home = remains.house.home
    for place in (home / "promotions").glob("*.json"):
        yield f"a promotion was not finished: {place.name}"
    for place in home.glob("jobs/*/attempts/*/exit.json"):
        yield f"an outcome was not delivered: {place.relative_to(home)}"
    for place in (remains.house.workspace / "outputs").glob(".*"):
        yield f"left beside the models: {place.name}"


def _integrity(remains: Remains) -> Iterator[str]:
    if not remains.rows.is_sqlite:
        return
    for row in remains.rows.ask("pragma integrity_check"):
        if row["integrity_check"] != "ok":
            yield f"integrity_check: {row['integrity_check']}"
    for row in remains.rows.ask("pragma foreign_key_check"):
        yield f"foreign_key_check: {row}"


RULES: dict[str, Rule] = {
    "lost": _lost,
    "wrong end": _wrong_end,
    "cancel": _cancel,
    "twice": _twice,
    "stale": _stale,
    "gap": _gap,
    "artifact": _artifact,
    "words": _words,
    "whole run": _whole_run,
    "devices": _devices,
    "outbox": _outbox,
    "leftovers": _leftovers,
    "integrity": _integrity,
}


def _by_job(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found


def fenced_words(*logs: Path) -> int:
    """How often a worker was told that its attempt is over."""
    words = ("was fenced", "another attempt owns the job")
    texts = [log.read_text("utf-8", "replace") for log in logs if log.exists()]
    return sum(text.count(word) for text in texts for word in words)

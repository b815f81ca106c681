"""Guards, taken out one at a time. Each must be missed by the oracle within a thousand schedules:
a guard whose loss nobody notices is not proven.

A mutant is a change of source text that must be found exactly once, so that none is lost when the
code around it moves.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from types import ModuleType


@dataclass(frozen=True)
class Mutant:
    name: str
    module: str
    """Below `tunesmith.store`."""
    before: str
    after: str


MUTANTS = (
    Mutant("the fence stays at a claim", "claims", "fence=jobs.c.fence + 1", "fence=jobs.c.fence"),
    Mutant(
        "a claim takes any state",
        "claims",
        "jobs.c.state == JobState.QUEUED.value,\n        jobs.c.is_validated",
        "jobs.c.state != JobState.SUCCEEDED.value,\n        jobs.c.is_validated",
    ),
    Mutant("a claim before the check", "claims", "jobs.c.is_validated.is_(True),", ""),
    Mutant("a claim before its time", "claims", "jobs.c.not_before <= now(),", ""),
    Mutant(
        "a claim out of turn",
        "claims",
        ".where(_is_claimable(), fits)\n        .order_by(jobs.c.priority.desc(), jobs.c.number)",
        ".where(_is_claimable(), fits)",
    ),
    Mutant(
        "a claim asked again is a new one",
        "claims",
        "if replayed is not None:",
        "if replayed is not None and False:",
    ),
    Mutant(
        "one token for every attempt", "claims", 'f"{job_id}:{fence}:{claim_id}"', 'f"{job_id}"'
    ),
    Mutant(
        "a heartbeat extends nothing",
        "claims",
        "        lease_until=now() + lease_seconds,\n        worker_id=worker_id,",
        "        worker_id=worker_id,",
    ),
    Mutant(
        "a heartbeat of any fence",
        "claims",
        "and_(rows.is_current(fence), rows.as_seen(row)),",
        "rows.as_seen(row),",
    ),
    Mutant(
        "what comes back asks for no memory",
        "reservations",
        "return _used(taken) + needs.memory_bytes <= most",
        "return True",
    ),
    Mutant(
        "no grace after a start",
        "claims",
        ".where(is_held()).values(lease_until",
        ".where(jobs.c.state == 'none').values(lease_until",
    ),
    Mutant(
        "a stop is not told",
        "claims",
        'None if row["stop_mode"] is None else StopMode(row["stop_mode"])',
        "None",
    ),
    Mutant("a write of any fence", "rows", "and_(jobs.c.fence == fence, or_(", "and_(or_("),
    Mutant(
        "a lapsed attempt comes back whatever made it wait",
        "rows",
        "and_(jobs.c.state == JobState.QUEUED.value, jobs.c.requeue_reason == LAPSE)",
        "jobs.c.state == JobState.QUEUED.value",
    ),
    Mutant(
        "numbers are not taken",
        "rows",
        "last_seq=jobs.c.last_seq + len(lines)",
        "last_seq=jobs.c.last_seq",
    ),
    Mutant(
        "devices are not freed at the end",
        "rows",
        '        release(tx, row["id"])\n        close_attempts',
        "        close_attempts",
    ),
    Mutant(
        "the quota is not given back",
        "rows",
        "unfinished=quotas.c.unfinished - 1",
        "unfinished=quotas.c.unfinished",
    ),
    Mutant(
        "a live lease is reaped",
        "endings",
        "jobs.c.lease_until < now()",
        "jobs.c.lease_until < now() + 1000",
    ),
    Mutant("what does not stop is left", "endings", "or_(is_lapsed, is_overdue)", "is_overdue"),
    Mutant(
        "a cancel is forgotten at the end",
        "endings",
        "if mode in (StopMode.CANCEL, StopMode.FORCE):",
        "if mode is StopMode.FORCE:",
    ),
    Mutant(
        "a pause is forgotten at the end",
        "endings",
        "return paused if mode is StopMode.PAUSE else waiting",
        "return waiting",
    ),
    Mutant(
        "a lost job that was cancelled waits again",
        "endings",
        "    if mode is not None:\n        return Verdict",
        "    if mode is StopMode.PAUSE:\n        return Verdict",
    ),
    Mutant(
        "an end is recorded by anyone",
        "endings",
        "settled = _settle(tx, row, verdict, rows.is_current(fence),",
        "settled = _settle(tx, row, verdict, jobs.c.id == job_id,",
    ),
    Mutant("an end told twice counts twice", "endings", "if recorded is not None:", "if False:"),
    Mutant(
        "tried for ever",
        "endings",
        'if failure.is_retryable and row["lapses"] + 1 < retry.max_lapses:',
        "if failure.is_retryable:",
    ),
    Mutant("no back-off", "endings", '"not_before": now() + wait,', '"not_before": now(),'),
    Mutant(
        "a new boot takes what is held",
        "endings",
        'if (row["id"], row["fence"]) in kept:',
        "if False:",
    ),
    Mutant(
        "a new boot takes from others",
        "endings",
        "is_its = jobs.c.worker_id == worker_id",
        "is_its = jobs.c.worker_id != ''",
    ),
    Mutant(
        "promoted without a win",
        "endings",
        "if ended is not None and callable(promote):",
        "if callable(promote):",
    ),
    Mutant(
        "a word sent twice is stored twice",
        "events",
        "if numbered.n == last_n + len(said) + 1:",
        "if numbered.n >= 0:",
    ),
    Mutant(
        "a gap is skipped",
        "events",
        "if numbered.n == last_n + len(said) + 1:",
        "if numbered.n >= last_n + len(said) + 1:",
    ),
    Mutant(
        "words of any fence",
        "events",
        "guard = and_(rows.is_current(fence), rows.as_seen(row))",
        "guard = rows.as_seen(row)",
    ),
    Mutant(
        "a checkpoint counts as none",
        "events",
        '"checkpoint_step": event.step, "lapses": 0}',
        '"checkpoint_step": event.step}',
    ),
    Mutant("GPUs are given out twice", "reservations", 'if f"gpu:{index}" not in taken', ""),
    Mutant(
        "slots are given out twice",
        "reservations",
        "capacity.max_slots - slots",
        "capacity.max_slots",
    ),
    Mutant(
        "memory is given out twice",
        "reservations",
        "capacity.max_memory_bytes - _used(taken)",
        "capacity.max_memory_bytes",
    ),
    Mutant(
        "no quota",
        "submissions",
        'quotas.c.unfinished <= bindparam("most")',
        'quotas.c.unfinished <= bindparam("most") + 100',
    ),
    Mutant(
        "anything goes on",
        "jobs",
        "guard = jobs.c.state == JobState.PAUSED.value",
        "guard = jobs.c.state != 'none'",
    ),
    Mutant(
        "a folder inside another's",
        "submissions",
        "        _refuse_rivals(tx, new.output_dir)",
        "        pass",
    ),
    Mutant(
        "an ended job is stopped",
        "jobs",
        "    if state.is_final:\n        raise ConflictError",
        "    if False:\n        raise ConflictError",
    ),
    Mutant(
        "one key, two jobs",
        "idempotency",
        "if row is None:\n        return None",
        "if row is None or True:\n        return None",
    ),
)


class _Loader(importlib.machinery.SourceFileLoader):
    mutant: Mutant

    def get_data(self, path: str) -> bytes:
        body = super().get_data(path)
        if not path.endswith(".py"):
            raise OSError("compiled anew")
        source = body.decode()
        count = source.count(self.mutant.before)
        assert count == 1, f"mutant {self.mutant.name!r}: its text is there {count} times"
        return source.replace(self.mutant.before, self.mutant.after).encode()

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Nothing of a mutant stays on the disk."""


@dataclass
class Finder(MetaPathFinder):
    """Loads one module with its guard taken out. Put it first in `sys.meta_path`."""

    mutant: Mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"tunesmith.store.{self.mutant.module}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.mutant = self.mutant
        spec.loader = loader
        return spec


def install(mutant: Mutant) -> None:
    """Call it before anything of the store is imported."""
    assert not any(name.startswith("tunesmith.store") for name in sys.modules)
    sys.meta_path.insert(0, Finder(mutant))

"""What was told of a job before it ran, beside what then happened."""

import time
from typing import Any

from sqlalchemy.engine import Connection

from tunesmith.spec.estimate import Actual, Forecast
from tunesmith.spec.records import Job
from tunesmith.store import events, history
from tunesmith.store.database import Store

WITHIN = 32
"""Of a job's first events and of its last: where what is looked for stands."""
_WANTED = ("queued", "validated", "probed", "started", "finished")


def of(store: Store, job: Job) -> Forecast | None:
    """None where nothing was told: a model that was still to be downloaded, an older server."""
    return store.read(lambda tx: _of(tx, job))


def _of(tx: Connection, job: Job) -> Forecast | None:
    told: dict[str, dict[str, Any]] = {}
    for kind, data in history.told(tx, job.id, _WANTED, WITHIN):
        if kind != "validated" or "estimate" in data:
            told[kind] = data
    estimate = told.get("validated", told.get("queued", {})).get("estimate")
    if estimate is None:
        return None
    kept = events.checkpoints(tx, job.id)
    actual = Actual(
        trainable_parameters=told.get("started", {}).get("trainable_parameters"),
        steps=job.step,
        tokens=told.get("finished", {}).get("detail", {}).get("tokens"),
        seconds=_seconds(job),
        peak_memory_bytes=job.metrics.get("peak_memory_bytes"),
        checkpoint_bytes=kept[0].size_bytes if kept else None,
    )
    return Forecast(**estimate, probe=told.get("probed"), actual=actual)


def _seconds(job: Job) -> float | None:
    if job.started_at is None:
        return None
    return round((job.finished_at or time.time()) - job.started_at, 1)

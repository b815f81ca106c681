"""A job in MLflow's words: events as points and status, settings as params, the rest as tags."""

from collections.abc import Sequence
from typing import Any

from tunesmith.hub.mlflow import JOB_TAG, Metric, key_for
from tunesmith.spec.records import Job, JobEvent

STATUS = {
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "requeued": "SCHEDULED",
    "paused": "SCHEDULED",
    "resumed": "SCHEDULED",
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}
"""Type of a job's event → the run's status."""
FINAL = ("succeeded", "failed", "cancelled")
_SHOWN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens_per_second",
    "peak_memory_bytes",
)


def points(batch: Sequence[JobEvent], step: int) -> tuple[list[Metric], int]:
    """Metrics of steps after `step`, each dated by its event: sent again, it is the same point."""
    found: list[Metric] = []
    for event in batch:
        told = event.data
        if event.type == "step" and told["step"] > step:
            step = told["step"]
            shown = {name: told.get(name) for name in _SHOWN}
            found += _points(event, {**told.get("metrics", {}), **shown})
        elif event.type == "evaluated" and told["step"] >= step:
            found += _points(event, told["metrics"])
    return found, step


def _points(event: JobEvent, values: dict[str, Any]) -> list[Metric]:
    at_ms, step, trial = int(event.at * 1000), event.data["step"], event.data.get("trial")
    if trial is not None:  # of a sweep: a curve of its own, over its own steps
        step, values = (
            event.data["trial_step"],
            {f"{trial}/{name}": one for name, one in values.items()},
        )
    return [
        {"key": key_for(name), "value": value, "timestamp": at_ms, "step": step}
        for name, value in values.items()
        if value is not None
    ]


def name_of(job: Job) -> str:
    return job.label or f"{job.spec.model.rstrip('/').rpartition('/')[2]}-{job.id}"


def tags_of(job: Job) -> dict[str, Any]:
    return {
        JOB_TAG: job.id,
        "tunesmith.owner": job.owner,
        "tunesmith.model": job.spec.model,
        "tunesmith.dataset": job.spec.dataset,
        "tunesmith.label": job.label,
        "mlflow.user": job.owner,
    }


def told_by(batch: Sequence[JobEvent]) -> dict[str, Any]:
    """Tags that follow the job: where it stands, what it made or why it failed."""
    told: dict[str, Any] = {}
    for event in batch:
        if event.type in STATUS:
            told["tunesmith.state"] = event.type
        if event.type == "succeeded":
            told["tunesmith.artifact"] = event.data.get("artifact")
        if event.type == "failed":
            told["tunesmith.error"] = event.data.get("message")
            told["tunesmith.failure_class"] = event.data.get("failure_class")
    return told


def params_of(job: Job) -> dict[str, Any]:
    return _flat(job.spec.model_dump(mode="json"))


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """`{"optim": {"seed": 1}}` → `{"optim.seed": 1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found

"""A database of many jobs for benchmarks, written by the store itself."""

from functools import partial

from sqlalchemy.engine import Connection

from tunesmith.api.families.training import SftRequest
from tunesmith.settings import Settings
from tunesmith.spec.records import JobState, NewJob, Source
from tunesmith.spec.train import Sft
from tunesmith.store import jobs
from tunesmith.store.database import Store

GROUP = 500


def fill(settings: Settings, queued: int, ended: int) -> None:
    """`ended` jobs that were cancelled, then `queued` that wait."""
    store = Store.open(settings.url)
    try:
        for size in _groups(ended):
            store.write(partial(_add_ended, settings=settings, size=size)).result()
        for size in _groups(queued):
            store.write(partial(_add_queued, settings=settings, size=size)).result()
    finally:
        store.close()


def _add_queued(tx: Connection, settings: Settings, size: int) -> None:
    for _ in range(size):
        _add(tx, settings)


def _add_ended(tx: Connection, settings: Settings, size: int) -> None:
    for _ in range(size):
        _end(tx, _add(tx, settings))


def _groups(count: int) -> list[int]:
    return [min(GROUP, count - start) for start in range(0, count, GROUP)]


def _add(tx: Connection, settings: Settings) -> str:
    """As a request of the contract leaves it."""
    asked = SftRequest(model_name="models/llama", dataset_path="data/rows.jsonl")
    new = NewJob(
        owner="test-key-001",
        spec=Sft(model=asked.model_name, dataset=asked.dataset_path),
        model=Source(name=asked.model_name, path=str(settings.workspace / "models" / "llama")),
        dataset=Source(name=asked.dataset_path, path="/nowhere/rows.jsonl", sha256="ab" * 32),
        is_validated=True,
        request=asked.model_dump(mode="json"),
    )
    outputs = settings.workspace / "outputs"
    return jobs.submit(tx, new, max_unfinished=10**6, outputs_root=outputs).id


def _end(tx: Connection, job_id: str) -> None:
    job = jobs.request_stop(tx, job_id, jobs.StopMode.CANCEL, 0.0)
    assert job.state is JobState.CANCELLED

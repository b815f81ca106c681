"""An attempt that comes back after a lapse, to devices that may have been given away."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from store_fixtures import LEASE, Ledger
from tunesmith.errors import FencedError
from tunesmith.spec.records import JobState, Needs


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path)
    yield made
    made.store.close()


def lapsed(ledger: Ledger) -> str:
    """A job on GPU 0 of w1 whose lease ran out."""
    job = ledger.submit(needs=Needs(gpus=1))
    assert ledger.claim(gpus=(0,), max_gpus=1) is not None
    ledger.beat(job.id, 1)
    ledger.clock.pass_by(LEASE + 1)
    assert ledger.reap()[0].state is JobState.QUEUED
    return job.id


def test_it_goes_on_where_its_gpu_is_still_free(ledger: Ledger) -> None:
    job_id = lapsed(ledger)
    ledger.beat(job_id, 1)
    assert ledger.get(job_id).state is JobState.RUNNING
    assert ledger.words(job_id)[-1] == "reattached"


def test_it_is_fenced_where_its_gpu_was_given_away(ledger: Ledger) -> None:
    job_id = lapsed(ledger)
    other = ledger.submit(needs=Needs(gpus=1), priority=10)
    claimed = ledger.claim(gpus=(0,), max_gpus=1)
    assert claimed is not None
    assert claimed.job.id == other.id
    with pytest.raises(FencedError):
        ledger.beat(job_id, 1)
    assert ledger.get(job_id).state is JobState.QUEUED

"""What is kept of a job after its end, and what goes: on both databases, by a clock of ours."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store_fixtures import Ledger, checkpointed, failed, started, succeeded
from tunesmith import manifest
from tunesmith.hub import Hub
from tunesmith.hub.retention import Retention, Swept
from tunesmith.settings import Settings
from tunesmith.spec.records import Job, Source
from tunesmith.store import catalog, events

DAY = 86_400


class Kept:
    """A ledger whose checkpoints are real folders, and the retention over both."""

    def __init__(self, folder: Path, url: str) -> None:
        self.ledger = Ledger(folder, url)
        settings = Settings.read({}, workspace=folder, checkpoint_days=30, reserve_bytes=0)
        self.hub = Hub(settings, self.ledger.store)
        self.jobs = settings.home / "jobs"

    def turn(self) -> Swept:
        return asyncio.run(Retention(self.hub).turn())

    def checkpoint(self, job: Job, fence: int, step: int, n: int = 1) -> Path:
        """Sealed, told and accepted."""
        place = self.attempt(job, fence) / "checkpoints" / f"step-{step}"
        digest = seal(place, "checkpoint")
        told = checkpointed(step) | {"path": str(place), "manifest_sha256": digest}
        self.ledger.say(job.id, fence, told, first_n=n)
        return place

    def attempt(self, job: Job, fence: int) -> Path:
        return self.jobs / job.id / "attempts" / str(fence)

    def rows(self, job: Job) -> list[str]:
        found = self.ledger.store.read(lambda tx: events.checkpoints(tx, job.id))
        return [Path(row.path).name for row in found]

    def run_twice(self, **over: Any) -> Job:
        """A first attempt with two checkpoints, a second with one; it still runs."""
        job = self.ledger.start(**over)
        self.ledger.say(job.id, 1, started())
        self.checkpoint(job, 1, 2, n=2)
        self.checkpoint(job, 1, 4, n=3)
        self.ledger.finish(job.id, 1, failed())
        self.ledger.clock.pass_by(400)
        assert self.ledger.claim() is not None
        self.ledger.beat(job.id, 2)
        self.checkpoint(job, 2, 6)
        return self.ledger.get(job.id)


def seal(place: Path, kind: str) -> str:
    place.mkdir(parents=True)
    (place / "가중치.safetensors").write_bytes(b"weights")
    return manifest.seal(place, kind)


@pytest.fixture
def kept(tmp_path: Path, database_url: str) -> Iterator[Kept]:
    opened = Kept(tmp_path, database_url)
    yield opened
    opened.ledger.store.close()


def test_a_job_that_is_not_over_keeps_everything(kept: Kept) -> None:
    job = kept.run_twice()
    kept.ledger.clock.pass_by(400 * DAY)
    swept = kept.turn()
    assert (swept.folders, swept.rows) == ([], 0)
    assert kept.rows(job) == ["step-6", "step-4", "step-2"]


def test_earlier_attempts_go_at_the_end_and_the_newest_checkpoint_stays(kept: Kept) -> None:
    job = kept.run_twice()
    kept.ledger.finish(job.id, 2, succeeded())
    swept = kept.turn()
    assert swept.folders == [kept.attempt(job, 1)]
    assert swept.rows == 2
    assert not kept.attempt(job, 1).exists()
    assert kept.rows(job) == ["step-6"]
    manifest.verify(kept.attempt(job, 2) / "checkpoints" / "step-6")
    assert kept.turn().folders == []


def test_an_earlier_attempt_with_the_newest_checkpoint_stays(kept: Kept) -> None:
    job = kept.ledger.start()
    newest = kept.checkpoint(job, 1, 4)
    kept.ledger.finish(job.id, 1, failed())
    kept.ledger.clock.pass_by(400)
    assert kept.ledger.claim() is not None
    kept.attempt(job, 2).mkdir(parents=True)
    kept.ledger.finish(job.id, 2, failed(), max_lapses=1)
    assert kept.ledger.get(job.id).state == "failed"
    assert kept.turn().folders == []
    manifest.verify(newest)


def test_checkpoints_go_with_their_rows_after_their_days_and_logs_stay(kept: Kept) -> None:
    job = kept.run_twice()
    kept.ledger.finish(job.id, 2, succeeded())
    log = kept.hub.log_path(job.id)
    log.parent.mkdir(parents=True)
    log.write_text("끝")
    kept.turn()
    kept.ledger.clock.pass_by(29.9 * DAY)
    assert kept.turn().folders == []
    kept.ledger.clock.pass_by(0.2 * DAY)
    assert kept.turn().folders == [kept.attempt(job, 2)]
    assert kept.rows(job) == []
    assert not (kept.jobs / job.id).exists()
    assert log.read_text() == "끝"
    assert kept.ledger.words(job.id)[-1] == "succeeded"


def test_days_of_nought_keep_checkpoints_for_ever(kept: Kept) -> None:
    over = {"workspace": kept.hub.workspace, "checkpoint_days": 0, "reserve_bytes": 0}
    kept.hub.settings = Settings.read({}, **over)
    job = kept.run_twice()
    kept.ledger.finish(job.id, 2, succeeded())
    kept.ledger.clock.pass_by(4000 * DAY)
    kept.turn()
    assert kept.rows(job) == ["step-6"]


def test_what_another_job_goes_on_from_stays_until_that_one_is_over(kept: Kept) -> None:
    job = kept.run_twice()
    place = kept.attempt(job, 2) / "checkpoints" / "step-6"
    kept.ledger.finish(job.id, 2, succeeded())
    other = kept.ledger.submit(resume_from=str(place), is_validated=False)
    kept.turn()
    kept.ledger.clock.pass_by(31 * DAY)
    assert kept.turn().folders == []
    manifest.verify(place)
    kept.ledger.stop(other.id)
    assert kept.turn().folders == [kept.attempt(job, 2)]


def test_what_a_model_was_made_from_and_what_has_a_name_stays(kept: Kept) -> None:
    based, named = kept.run_twice(), kept.run_twice()
    for job in (based, named):
        kept.ledger.finish(job.id, 2, succeeded())
    base = kept.attempt(based, 2) / "checkpoints" / "step-6"
    child = kept.ledger.start(model=Source(name="base", path=str(base / "model")))
    kept.ledger.finish(child.id, 1, succeeded())
    place = str(kept.attempt(named, 2) / "checkpoints" / "step-6" / "model")
    kept.ledger.write(lambda tx: catalog.register(tx, "model", "모델", place, "operator"))
    kept.turn()
    kept.ledger.clock.pass_by(31 * DAY)
    assert kept.turn().folders == []
    assert base.is_dir()


def test_what_rewards_a_job_that_waits_stays(kept: Kept) -> None:
    scoring = kept.run_twice()
    kept.ledger.finish(scoring.id, 2, succeeded())
    place = kept.attempt(scoring, 2) / "checkpoints" / "step-6" / "model"
    other = kept.ledger.submit(reward_models=(Source(name="r", path=str(place)),))
    kept.ledger.clock.pass_by(31 * DAY)
    kept.turn()
    assert place.parent.is_dir()
    kept.ledger.stop(other.id)
    kept.turn()
    assert not place.parent.exists()


def test_a_model_that_found_no_place_of_its_own_and_a_receipt_under_way_stay(kept: Kept) -> None:
    lost, waiting = kept.run_twice(), kept.run_twice()
    for job in (lost, waiting):
        kept.ledger.finish(job.id, 2, failed(), max_lapses=1)
    model = kept.attempt(lost, 2) / "artifact"
    seal(model, "artifact")
    receipt = kept.attempt(waiting, 1) / "exit.json"
    receipt.write_text("{}")
    kept.turn()
    kept.ledger.clock.pass_by(31 * DAY)
    kept.turn()
    manifest.verify(model)
    assert not (kept.attempt(lost, 2) / "checkpoints").exists()
    assert receipt.exists()


def test_folders_that_no_row_speaks_of_are_told_of_and_left(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = kept.jobs / "00facade"
    (stranger / "attempts" / "1" / "checkpoints" / "step-3").mkdir(parents=True)
    retention = Retention(kept.hub)
    for _ in range(2):
        swept = asyncio.run(retention.turn())
        retention._tell(swept)
    assert swept.strangers == [stranger]
    assert stranger.is_dir()
    assert [line.message for line in caplog.records if "00facade" in line.message] == [
        f"no job of this database made {stranger}; it is left as it is"
    ]


def test_rows_of_checkpoints_that_their_trainer_thinned_out_are_forgotten(kept: Kept) -> None:
    job = kept.run_twice()
    manifest.remove(kept.attempt(job, 1) / "checkpoints" / "step-2")
    assert kept.turn().rows == 0  # it may be on its way, on another host's shared folder
    kept.ledger.clock.pass_by(601)
    assert kept.turn().rows == 1
    assert kept.rows(job) == ["step-6", "step-4"]
    assert kept.ledger.get(job.id).checkpoint_step == 6

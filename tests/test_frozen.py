"""Processes that are frozen, and go on later as if nothing had been: SIGSTOP, then SIGCONT."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from house import KEY, PATIENCE, QUICK, House, open_house

LEASE = 2.0
TALK: dict[str, Any] = {
    "model": "models/tiny",
    "messages": [{"role": "user", "content": "강물 水 🌊"}],
    "max_tokens": 2,
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    over = {
        "TUNESMITH_LEASE_SECONDS": str(LEASE),
        "TUNESMITH_HEARTBEAT_SECONDS": "0.3",
        "TUNESMITH_REAPER_SECONDS": "0.3",
        "TUNESMITH_STALL_SECONDS": "30",
        "TUNESMITH_ENGINE_SILENT_SECONDS": "2",
        "TUNESMITH_CPU_SLOTS": "2",
    }
    with open_house(tmp_path_factory.mktemp("frozen"), **over) as opened:
        yield opened


@contextlib.contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def history(house: House, job_id: str) -> list[dict[str, Any]]:
    """Checked: no gap, one end, no word of an older attempt after a newer one's."""
    events = house.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    fences = [event["fence"] for event in events]
    assert fences == sorted(fences)
    assert sum(event["type"] in ("succeeded", "failed", "cancelled") for event in events) == 1
    return events


def test_an_api_that_was_frozen_for_three_leases_takes_no_job_from_its_worker(
    house: House,
) -> None:
    job_id = house.submit(num_epochs=12, save_steps=50)
    house.wait_event(job_id, "step")
    assert house.process is not None
    with frozen([psutil.Process(house.process.pid)]):
        time.sleep(3 * LEASE)
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 1), job
    assert "requeued" not in {event["type"] for event in history(house, job_id)}


def test_a_worker_that_was_frozen_past_its_lease_goes_on_where_nobody_took_its_job(
    house: House,
) -> None:
    job_id = house.submit(num_epochs=12, save_steps=50)
    trainer = house.trainer(job_id)
    with frozen([house.worker(), trainer]):
        house.wait_event(job_id, "requeued", reason="lapse")
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 1), job
    assert "reattached" in {event["type"] for event in history(house, job_id)}


def test_a_frozen_worker_whose_job_another_took_is_fenced_and_kills_its_trainer(
    house: House, tmp_path: Path
) -> None:
    job_id = house.submit(num_epochs=12, save_steps=20)
    house.wait_event(job_id, "checkpointed")
    zombie, worker = house.trainer(job_id), house.worker()
    with frozen([worker, zombie]), another_worker(house, tmp_path / "강 other"):
        house.wait_event(job_id, "claimed", worker_id=second_worker(house, job_id))
        job = house.wait_end(job_id)
        assert job["status"] == "completed", job
        assert job["attempts"] >= 2
        sealed = (house.workspace / "outputs" / job_id / "manifest.json").read_bytes()
        before = len(history(house, job_id))
    house.wait(lambda: is_gone(zombie))
    assert worker.is_running()
    time.sleep(1)  # whatever it had to say was refused by then
    assert len(history(house, job_id)) == before
    assert (house.workspace / "outputs" / job_id / "manifest.json").read_bytes() == sealed
    again = house.submit(max_steps=2)
    assert house.wait_end(again)["status"] == "completed"


def second_worker(house: House, job_id: str) -> str:
    """Its name, once it has the job."""

    def look() -> str | None:
        claims = [event for event in house.events(job_id) if event["type"] == "claimed"]
        return str(claims[-1]["data"]["worker_id"]) if len(claims) > 1 else None

    return str(house.wait(look))


@contextlib.contextmanager
def another_worker(house: House, place: Path) -> Iterator[None]:
    """With a home of its own, as on another host."""
    place.mkdir()
    environment = {
        **os.environ,
        **QUICK,
        **house.over,
        "TUNESMITH_WORKSPACE": str(place),
        "TUNESMITH_WORKER_TOKEN": (house.home / "worker.token").read_text(),
    }
    with (place / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "worker", "--server", house.url],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_a_trainer_that_is_frozen_alone_is_killed_and_its_job_tried_again(house: House) -> None:
    job_id = house.submit(num_epochs=12, save_steps=20)
    house.wait_event(job_id, "checkpointed")
    trainer = house.trainer(job_id)
    trainer.send_signal(signal.SIGSTOP)
    requeued = house.wait_event(job_id, "requeued")
    assert requeued["data"]["failure_class"] == "stalled"
    assert "no word from the trainer for 30 s" in requeued["data"]["message"]
    house.wait(lambda: is_gone(trainer))
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 2), job
    started = [event for event in history(house, job_id) if event["type"] == "started"]
    assert started[-1]["data"]["start_step"] >= 20


def test_a_chat_with_a_frozen_engine_is_answered_by_a_new_one(house: House) -> None:
    with house.client as client:
        assert client.post(
            "/v1/chat/completions", json=TALK, headers=KEY, timeout=PATIENCE
        ).is_success
        [(pid,)] = house.query("select pid from engines where state = 'ready'")
        engine = psutil.Process(pid)
        engine.send_signal(signal.SIGSTOP)
        answers: list[httpx2.Response] = []
        asking = threading.Thread(target=lambda: answers.append(ask(house)))
        asking.start()
        assert client.get("/health").is_success
        asking.join(PATIENCE)
        [answer] = answers
        assert answer.is_success, answer.text
        assert is_gone(engine)


def ask(house: House) -> httpx2.Response:
    with house.client as client:
        return client.post("/v1/chat/completions", json=TALK, headers=KEY, timeout=PATIENCE)

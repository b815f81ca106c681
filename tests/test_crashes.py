"""What is killed loses no job: the API, the worker, the trainer, the forking process."""

import contextlib
import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from house import KEY, PATIENCE, House, open_house


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with open_house(tmp_path_factory.mktemp("crashes")) as opened:
        yield opened


@pytest.fixture
def house(shared: House) -> House:
    """One for all, since a start costs seconds; a test may leave it killed."""
    if shared.process is None or shared.process.poll() is not None:
        shared.start()
    return shared


def long_job(house: House) -> str:
    """Three hundred steps with a checkpoint every few, slow enough to be caught in the act."""
    job_id = house.submit(num_epochs=20, save_steps=20, lora_dropout=0.1, learning_rate=1e-3)
    house.wait_event(job_id, "checkpointed")
    return job_id


def losses(house: House, job_id: str) -> dict[int, float]:
    """By step; an attempt that goes on from a checkpoint says some steps again."""
    steps = [event["data"] for event in house.events(job_id) if event["type"] == "step"]
    return {step["step"]: step["loss"] for step in steps}


def check_history(house: House, job_id: str) -> list[dict[str, Any]]:
    """Every number once, one end, and no word of an older attempt after a newer one's."""
    events = house.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    ends = [event for event in events if event["type"] in ("succeeded", "failed", "cancelled")]
    assert len(ends) == 1
    fences = [event["fence"] for event in events]
    assert fences == sorted(fences)
    return events


def test_a_trainer_killed_goes_on_from_its_checkpoint_to_the_same_losses(house: House) -> None:
    job_id = long_job(house)
    house.kill(house.trainer(job_id))
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    events = check_history(house, job_id)
    started = [event["data"]["start_step"] for event in events if event["type"] == "started"]
    assert len(started) == 2
    assert started[0] == 0
    assert started[1] >= 20
    undisturbed = house.submit(num_epochs=20, save_steps=20, lora_dropout=0.1, learning_rate=1e-3)
    assert house.wait_end(undisturbed)["status"] == "completed"
    assert losses(house, job_id) == losses(house, undisturbed)
    weights = [
        (house.workspace / "outputs" / name / "adapter_model.safetensors").read_bytes()
        for name in (job_id, undisturbed)
    ]
    assert weights[0] == weights[1]


def test_an_api_killed_stops_no_training(house: House) -> None:
    job_id = long_job(house)
    trainer = house.trainer(job_id)
    assert house.process is not None
    house.process.kill()
    house.process.wait()
    assert trainer.is_running()
    house.start()
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    assert job["attempts"] == 1
    check_history(house, job_id)


def test_a_worker_killed_takes_its_trainers_along_and_the_job_goes_on(house: House) -> None:
    job_id = long_job(house)
    trainer = house.trainer(job_id)
    house.kill(house.worker())
    house.wait(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    assert job["attempts"] == 2
    check_history(house, job_id)


def test_the_forking_process_killed_costs_an_attempt_not_the_job(house: House) -> None:
    job_id = long_job(house)
    house.kill(*house.children("tunesmith.train.zygote"))
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    check_history(house, job_id)


def test_everything_killed_at_once_goes_on_after_a_start(house: House) -> None:
    job_id = long_job(house)
    assert house.process is not None
    house.process.kill()
    house.process.wait()
    house.kill(*house.children())
    house.wait(lambda: not house.children())
    house.start()
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    assert job["attempts"] == 2
    check_history(house, job_id)


def test_a_worker_that_dies_after_a_long_absence_of_the_api_costs_no_checkpoint_it_had_told(
    house: House,
) -> None:
    """The trainer has let go of many since, which nobody will ever hear of."""
    job_id = house.submit(num_epochs=10_000, save_steps=5)
    house.wait_event(job_id, "checkpointed")
    assert house.process is not None
    house.process.kill()
    house.process.wait()
    shelf = house.home / "jobs" / job_id / "attempts" / "1" / "checkpoints"
    seen: set[str] = set()

    def look() -> bool:
        seen.update(path.name for path in shelf.glob("step-*"))
        return len(seen) > 8

    house.wait(look)
    house.kill(*house.children())
    house.wait(lambda: not house.children())
    house.start()

    def starts() -> list[dict[str, Any]]:
        return [event for event in house.events(job_id) if event["type"] == "started"]

    house.wait(lambda: len(starts()) > 1)
    told = {event["data"]["step"] for event in checkpoints(house, job_id) if event["fence"] == 1}
    assert starts()[1]["data"]["start_step"] == max(told)
    with house.client as client:
        client.post(f"/jobs/{job_id}/cancel", params={"force": True})
    house.wait_end(job_id)


def test_a_server_that_is_stopped_leaves_no_process_and_goes_on_later(house: House) -> None:
    job_id = long_job(house)
    house.stop()
    assert house.children() == []
    house.start()
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    events = check_history(house, job_id)
    requeued = [event for event in events if event["type"] == "requeued"]
    assert [event["data"]["lapses"] for event in requeued] == [0]


def test_a_trainer_that_does_not_stop_is_killed_with_its_session(tmp_path: Path) -> None:
    with open_house(tmp_path, TUNESMITH_GRACE_SECONDS="1") as house:
        job_id = house.submit(num_epochs=10_000)
        trainer = house.trainer(job_id)
        house.wait_event(job_id, "step")
        trainer.send_signal(signal.SIGSTOP)
        with house.client as client:
            client.post(f"/jobs/{job_id}/cancel")
        assert house.wait_end(job_id)["status"] == "cancelled"
        house.wait(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(house: House) -> None:
    job_id = long_job(house)
    house.wait(lambda: len(checkpoints(house, job_id)) >= 2)
    trainer = house.trainer(job_id)
    trainer.send_signal(signal.SIGSTOP)
    time.sleep(2)  # what it had said is on its way
    newest = checkpoints(house, job_id)[-1]
    victim = Path(newest["data"]["path"]) / "model" / "adapter_model.safetensors"
    body = bytearray(victim.read_bytes())
    body[-1] ^= 1
    victim.write_bytes(body)
    trainer.kill()
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    events = check_history(house, job_id)
    told = [event["data"].get("code") for event in events if event["type"] == "notice"]
    assert "checkpoint_rejected" in told
    starts = [event["data"]["start_step"] for event in events if event["type"] == "started"]
    assert starts[-1] < newest["data"]["step"]


def checkpoints(house: House, job_id: str) -> list[dict[str, Any]]:
    return [event for event in house.events(job_id) if event["type"] == "checkpointed"]


def test_a_worker_killed_before_its_last_word_delivers_it_when_it_is_back(house: House) -> None:
    job_id = house.submit(max_steps=3)
    house.wait_end(job_id)
    receipts = list((house.home / "jobs").glob("*/attempts/*/exit.json"))
    assert receipts == []
    place = house.workspace / "outputs" / job_id / "training.json"
    assert json.loads(place.read_text())


def test_a_server_after_a_killed_one_takes_its_worker_along_at_the_end(house: House) -> None:
    house.worker()
    assert house.process is not None
    house.process.kill()
    house.process.wait()
    before = {process.pid for process in house.children("tunesmith.work.worker")}
    house.start()
    assert {process.pid for process in house.children("tunesmith.work.worker")} == before
    house.stop()
    assert house.children() == []


def test_a_server_stopped_in_its_first_second_leaves_no_process(house: House) -> None:
    """The worker may not even hold its lock yet."""
    house.stop()
    for seconds in (0.0, 0.3, 0.8):
        house.start()
        time.sleep(seconds)
        assert house.process is not None
        house.process.send_signal(signal.SIGTERM)
        house.process.send_signal(signal.SIGTERM)
        house.stop()
        assert house.children() == []


def test_a_follower_s_stream_ends_when_the_server_does(house: House) -> None:
    job_id = house.submit(num_epochs=10_000)
    house.wait_event(job_id, "step")
    with house.client as client, client.stream("GET", f"/jobs/{job_id}/events") as reply:
        lines = reply.iter_lines()
        next(lines)
        assert house.process is not None
        house.process.send_signal(signal.SIGTERM)
        assert any(line.startswith("id: ") for line in lines)
    house.stop()
    assert "Cancel" not in (house.workspace / "server.log").read_text()
    house.start()
    with house.client as client:
        client.post(f"/jobs/{job_id}/cancel", params={"force": True})
    assert house.wait_end(job_id)["status"] == "cancelled"


def test_keeping_house_survives_a_turn_that_fails(house: House) -> None:
    """A trigger that refuses every change of a job stands in for a disk that is full."""
    refuse = "create trigger sick before update on jobs begin select raise(abort, 'sick'); end"
    job_id = long_job(house)
    worker = house.worker()
    worker.send_signal(signal.SIGSTOP)
    try:
        change(house, refuse)
        time.sleep(6)  # longer than the lease: the reaper meets the trigger
        change(house, "drop trigger sick")
        house.wait_event(job_id, "requeued", reason="lapse")
    finally:
        worker.send_signal(signal.SIGCONT)
    assert house.wait_end(job_id)["status"] == "completed"
    check_history(house, job_id)


def change(house: House, statement: str) -> None:
    import sqlite3

    with contextlib.closing(sqlite3.connect(house.home / "db.sqlite", timeout=30)) as db, db:
        db.execute(statement)


def test_an_engine_killed_costs_the_next_question_nothing_but_time(house: House) -> None:
    body = {
        "model": "models/tiny",
        "messages": [{"role": "user", "content": "강물 🌊"}],
        "max_tokens": 2,
    }
    with house.client as client:
        assert client.post("/v1/chat/completions", json=body, headers=KEY, timeout=120).is_success
        engine = psutil.Process(engine_pid(house))
        engine.kill()
        house.wait(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
        assert client.post("/v1/chat/completions", json=body, headers=KEY, timeout=120).is_success
        assert engine_pid(house) != engine.pid


def engine_pid(house: House) -> int:
    import sqlite3

    with contextlib.closing(sqlite3.connect(house.home / "db.sqlite")) as db:
        row = db.execute("select pid from engines where state = 'ready'").fetchone()
    return int(row[0])


def test_an_engine_killed_in_mid_answer_says_so_and_the_next_question_is_answered(
    house: House,
) -> None:
    client = openai.OpenAI(
        api_key="test-key-001", base_url=house.url + "/v1", timeout=PATIENCE, max_retries=0
    )
    ask = {"model": "models/tiny", "prompt": "강물", "temperature": 1.0}
    assert client.completions.create(**ask, max_tokens=2).choices
    with contextlib.closing(sqlite3.connect(house.home / "db.sqlite")) as db:
        (pid,) = db.execute("select pid from engines where state = 'ready'").fetchone()
    parts = client.completions.create(**ask, max_tokens=240, n=16, stream=True)  # so it lasts
    next(iter(parts))
    psutil.Process(pid).kill()
    with pytest.raises(openai.APIError, match="stopped in mid-answer"):
        for _ in parts:
            pass
    assert client.completions.create(**ask, max_tokens=2).choices

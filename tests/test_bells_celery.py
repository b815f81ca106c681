"""Celery wakes the worker and loses nothing: real brokers, Celery workers, trainers, databases."""

import base64
import json
import pickle
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from bells_fixtures import Bells, break_broker, is_gone, open_bells
from servers import Postgres, Redis, open_redis, wait_for


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with open_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, redis: Redis) -> Iterator[Bells]:
    with open_bells(tmp_path_factory.mktemp("bells"), redis) as opened:
        yield opened


@pytest.fixture
def bells(shared: Bells) -> Bells:
    """With one Celery worker, ready."""
    if not shared.celeries:
        seen = shared.ready_times()
        shared.start_celery()
        shared.wait_ready(seen + 1)
    return shared


def long_job(bells: Bells) -> str:
    job_id = bells.house.submit(num_epochs=20, save_steps=20, learning_rate=1e-3)
    bells.house.wait_event(job_id, "checkpointed")
    return job_id


def test_faults_of_the_broker_lose_no_job_and_double_none(bells: Bells) -> None:
    """Emptied five times, killed twice, every message six times."""
    found = break_broker(bells, jobs=30, flushes=5, kills=2, celery_kills=0)
    assert found == {
        "jobs": 30,
        "refused": 0,
        "lost": 0,
        "failed": 0,
        "ends": 30,
        "doubled_ends": 0,
        "extra_attempts": 0,
        "flushes": 5,
        "broker_kills": 2,
        "celery_kills": 0,
    }


def test_without_a_broker_jobs_are_taken_and_run(bells: Bells) -> None:
    bells.redis.stop()
    try:
        names = [bells.house.submit(max_steps=1) for _ in range(3)]
        assert [bells.house.wait_end(name)["attempts"] for name in names] == [1, 1, 1]
    finally:
        bells.redis.start()


def test_kill_9_takes_all_along_and_the_host_s_other_celery_worker_goes_on(bells: Bells) -> None:
    """Two of them, in different pools, share one worker."""
    house = bells.house
    worker, seen = house.worker(), bells.ready_times()
    bells.start_celery("--pool", "threads", "-c", "2", "-n", "둘@%h")
    bells.wait_ready(seen + 1)
    assert house.children("tunesmith.work.worker") == [worker]
    job_id = long_job(bells)
    trainer = house.trainer(job_id)
    owner = psutil.Process(worker.ppid())
    family = [trainer, *owner.children(recursive=True)]
    house.kill(owner)
    house.wait(lambda: all(map(is_gone, family)))
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 2)
    starts = [e["data"]["start_step"] for e in house.events(job_id) if e["type"] == "started"]
    assert starts[1] >= 20
    bells.forget_dead()


def test_a_worker_that_ends_by_itself_is_started_again(bells: Bells) -> None:
    first = bells.house.worker()
    bells.house.kill(first)
    bells.house.wait(lambda: is_gone(first) and bells.house.children("tunesmith.work.worker"))


def test_a_pickle_in_the_queue_is_refused_and_hurts_nobody(bells: Bells, tmp_path: Path) -> None:
    from redis import Redis as Client

    client = Client(port=bells.redis.port)
    mark = tmp_path / "열렸다"
    body = base64.b64encode(pickle.dumps(_Opens(str(mark)))).decode()
    message = {
        "body": body,
        "content-encoding": "binary",
        "content-type": "application/x-python-serialize",
        "headers": {"task": "tunesmith.ring", "id": "x", "lang": "py"},
        "properties": {
            "delivery_tag": "t",
            "body_encoding": "base64",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "tunesmith.bell", "routing_key": ""},
        },
    }
    for said in (json.dumps(message), "no json at all", json.dumps({"body": "강물"})):
        client.publish("/0.tunesmith.bell", said)
    client.close()
    job_id = bells.house.submit(max_steps=1)
    assert bells.house.wait_end(job_id)["status"] == "completed"
    assert not mark.exists()
    assert bells.celeries[0].poll() is None


class _Opens:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_celery_stopped_lets_the_trainer_write_a_checkpoint(bells: Bells) -> None:
    job_id = long_job(bells)
    bells.stop_celery()
    assert bells.house.children() == []
    requeued = bells.house.wait_event(job_id, "requeued")
    assert requeued["data"]["lapses"] == 0
    with bells.house.client as client:
        client.post(f"/jobs/{job_id}/cancel")
    assert bells.house.wait_end(job_id)["status"] == "cancelled"


def test_jobs_that_are_rung_for_six_times_run_once_and_celery_stops_without_its_broker(
    tmp_path: Path, redis: Redis, postgres: Postgres
) -> None:
    """On PostgreSQL, in Celery's solo pool, with a worker that asks by itself once a minute."""
    url = postgres.database()
    with open_bells(
        tmp_path, redis, TUNESMITH_DATABASE_URL=url, TUNESMITH_POLL_SECONDS="60"
    ) as bells:
        bells.start_celery("--pool", "solo")
        bells.wait_ready()
        for _ in range(3):
            names = [bells.house.submit(max_steps=1) for _ in range(2)]
            bells.ring(6)
            for name in names:
                wait_for(partial(is_done, bells, name), "a job that was rung for")
                assert bells.house.job(name)["attempts"] == 1
        job_id = bells.house.submit(num_epochs=10_000)
        bells.house.wait_event(job_id, "step")
        with bells.house.client as client:  # a busy worker hears of orders without a ring
            client.post(f"/jobs/{job_id}/cancel")
        wait_for(lambda: bells.house.job(job_id)["state"] == "cancelled", "the cancel")
        redis.stop()
        try:
            time.sleep(1)  # it looks for its broker now
            bells.celeries[0].send_signal(signal.SIGTERM)
            bells.stop_celery()
            assert bells.house.children() == []
        finally:
            redis.start()


def is_done(bells: Bells, job_id: str) -> bool:
    return bool(bells.house.job(job_id)["state"] == "succeeded")

"""Submissions: once each, whatever happens meanwhile; and the list of them."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import create_engine, text
from starlette.testclient import TestClient

from api_fixtures import ASKED, hub_of, make_workspace, open_door
from house import House, build
from store_fixtures import Ledger, new_job
from tunesmith.spec.records import StopMode
from tunesmith.store import events, jobs

LOCK_SQLITE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("begin immediate")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def door(tmp_path: Path, database_url: str) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path), database_url=database_url) as door:
        yield door


@pytest.fixture
def house(tmp_path: Path, database_url: str) -> Iterator[House]:
    house = build(tmp_path, TUNESMITH_DATABASE_URL=database_url)
    try:
        yield house.start("api", "--no-worker")
    finally:
        house.end()


def submit(door: TestClient, key: str | None = None, **fields: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return door.post("/train/sft", json=ASKED | fields, headers=headers)


# one key, one job


def test_a_hundred_requests_with_one_key_make_one_job(door: TestClient) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: submit(door, "the-one"), range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(door.get("/jobs").json()) == 1
    again = submit(door, "the-one", seed=7)
    assert (again.status_code, len(door.get("/jobs").json())) == (422, 1)


def test_a_replay_is_answered_though_the_request_would_be_refused_by_now(door: TestClient) -> None:
    first = submit(door, "k")
    (hub_of(door).workspace / "data" / "chat.jsonl").unlink()
    assert submit(door).status_code == 404
    assert submit(door, "other").status_code == 404
    assert submit(door, "k").json() == first.json()


def test_replays_take_nothing_of_the_quota(tmp_path: Path, database_url: str) -> None:
    with open_door(make_workspace(tmp_path), database_url=database_url, max_queued_jobs=2) as door:
        first = submit(door, "a").json()
        for _ in range(5):
            assert submit(door, "a").json() == first
        assert submit(door, "b").status_code == 200
        assert submit(door, "c").status_code == 429
        assert submit(door, "a").json() == first


def test_of_many_at_once_each_is_taken_or_refused_for_itself(
    tmp_path: Path, database_url: str
) -> None:
    """They are written together, and one by one where that fails: the quota is met exactly."""
    with open_door(make_workspace(tmp_path), database_url=database_url, max_queued_jobs=10) as door:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(submit, door, f"k{number % 30}") for number in range(60)]
            answers = [one.result() for one in asked]
        taken = {answer.json()["job_id"] for answer in answers if answer.status_code == 200}
        assert {answer.status_code for answer in answers} == {200, 429}
        assert len(taken) == len(door.get("/jobs").json()) == 10


def test_many_written_together_are_what_each_would_be_alone(
    tmp_path: Path, database_url: str
) -> None:
    with contextlib.closing(Ledger(tmp_path, database_url).store) as store:
        news = [new_job(owner="가" if number % 2 else "b", label="🎉") for number in range(100)]
        given: dict[str, Any] = {"max_unfinished": 51, "outputs_root": "/ws/outputs"}
        alone = [store.write(partial(jobs.submit, new=new, **given)).result() for new in news[:2]]
        many = store.write(lambda tx: jobs.submit_many(tx, news[2:], **given)).result()
        found = {job.id: job for job in store.read(jobs.list_jobs)}
        assert [found[job.id] for job in many] == many
        one, other = alone[0], many[0]
        drawn = {"id", "output_dir", "created_at", "not_before"}
        assert one.model_dump(exclude=drawn) == other.model_dump(exclude=drawn)
        for job in (one, other):
            told = store.read(partial(events.after, job_id=job.id))
            assert [(event.seq, event.type, event.data) for event in told] == [(1, "queued", {})]
        with pytest.raises(jobs.OneByOne):
            store.write(lambda tx: jobs.submit_many(tx, news[:4], **given)).result()
        assert len(store.read(jobs.list_jobs)) == 100
        store.write(lambda tx: jobs.submit_many(tx, news[:2], **given)).result()


# a server that is killed


class Asking(threading.Thread):
    """A client that sends a request with a key; the answer may never come."""

    def __init__(self, house: House, key: str) -> None:
        super().__init__()
        self._house, self._key = house, key
        self.job_id: str | None = None

    def run(self) -> None:
        headers = {"Idempotency-Key": self._key}
        with contextlib.suppress(httpx2.HTTPError), self._house.client as client:
            reply = client.post("/train/sft", json=ASKED, headers=headers)
            self.job_id = reply.json()["job_id"]


def kill(house: House) -> None:
    assert house.process
    house.process.send_signal(signal.SIGKILL)
    house.process.wait()


def retried(house: House, key: str) -> str:
    house.start("api", "--no-worker")
    asking = Asking(house, key)
    asking.run()
    assert asking.job_id
    return asking.job_id


def job_ids(house: House) -> list[str]:
    return [row[0] for row in house.query("select id from jobs order by number")]


def test_killed_as_soon_as_the_row_is_there_the_retry_brings_that_job(house: House) -> None:
    asking = Asking(house, "key-after")
    asking.start()
    while not (found := job_ids(house)):
        assert asking.is_alive()
    kill(house)
    asking.join()
    assert asking.job_id in (None, *found)
    assert retried(house, "key-after") == found[0]
    assert job_ids(house) == found


def test_killed_before_the_commit_the_retry_makes_the_only_job(house: House) -> None:
    with held(house):
        asking = Asking(house, "key-before")
        asking.start()
        time.sleep(0.5)  # the request is in, its commit waits for the lock
        kill(house)
        asking.join()
    assert asking.job_id is None
    assert job_ids(house) == []
    made = retried(house, "key-before")
    assert job_ids(house) == [made]


def test_while_another_process_holds_the_database_submissions_wait(house: House) -> None:
    asking = [Asking(house, f"k{number}") for number in range(8)]
    with held(house):
        for one in asking:
            one.start()
        time.sleep(1.0)
        assert [one.job_id for one in asking] == [None] * 8
        with house.client as client:
            assert client.get("/jobs").json() == []
    for one in asking:
        one.join()
    assert sorted(job_ids(house)) == sorted(str(one.job_id) for one in asking)


@contextlib.contextmanager
def held(house: House) -> Iterator[None]:
    """No commit of a job comes through."""
    if not house.over["TUNESMITH_DATABASE_URL"].startswith("sqlite"):
        engine = create_engine(house.over["TUNESMITH_DATABASE_URL"])
        with engine.connect() as holder:
            holder.execute(text("lock table jobs in exclusive mode"))
            yield
        engine.dispose()
        return
    command = [sys.executable, "-c", LOCK_SQLITE, str(house.home / "db.sqlite")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"locked\n"
        yield


# the list


def test_the_list_shows_each_job_as_it_shows_itself(door: TestClient) -> None:
    asked = [submit(door, seed=seed, suffix="접미사") for seed in range(6)]
    ids = [answer.json()["job_id"] for answer in asked]
    hub = hub_of(door)
    hub.store.write(lambda tx: jobs.request_stop(tx, ids[0], StopMode.CANCEL, 0)).result()
    hub.store.write(lambda tx: jobs.request_stop(tx, ids[1], StopMode.PAUSE, 0)).result()
    change = text("update jobs set state = 'stopping', stop_mode = :mode where id = :id")
    stopping = [{"mode": "pause", "id": ids[2]}, {"mode": "cancel", "id": ids[3]}]
    hub.store.write(lambda tx: tx.execute(change, stopping).rowcount).result()
    listed = door.get("/jobs").json()
    assert [job["job_id"] for job in listed] == ids[::-1]
    for job in listed:
        detail = door.get(f"/jobs/{job['job_id']}").json()
        assert {name: detail[name] for name in job} == job
    words: dict[str, set[int]] = {
        "pending": {1, 4, 5},
        "running": {2},
        "cancelled": {0, 3},
        "failed": set(),
    }
    for word, numbers in words.items():
        found = {job["job_id"] for job in door.get("/jobs", params={"status": word}).json()}
        assert found == {ids[number] for number in numbers}, word
    page = door.get("/jobs", params={"status": "pending", "limit": 2, "offset": 1}).json()
    assert [job["job_id"] for job in page] == [ids[4], ids[1]]

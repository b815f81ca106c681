"""Submissions: once each whatever happens, fast without being stale; and the list of them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import create_engine, text
from starlette.testclient import TestClient

from api_fixtures import ASKED, LOCAL, ROW, hub_of, make_workspace, open_door
from house import PATIENCE, QUICK, House, build
from servers import Postgres, free_port
from store_fixtures import Ledger, new_job
from tunesmith.hub.known import SETTLED_NS, Unknown
from tunesmith.hub.principal import Principal
from tunesmith.spec.records import StopMode
from tunesmith.store import events, jobs

DATABASES = ["sqlite", "postgres"]
LOCK_SQLITE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("begin immediate")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """Of a fresh database; empty for the workspace's own SQLite."""
    if request.param == "sqlite":
        return ""
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.database()


@pytest.fixture
def door(tmp_path: Path, url: str) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path), database_url=url) as door:
        yield door


@pytest.fixture
def house(tmp_path: Path, url: str) -> Iterator[House]:
    house = build(tmp_path, **({"TUNESMITH_DATABASE_URL": url} if url else {}))
    try:
        yield house.start("api", "--no-worker")
    finally:
        house.end()


both = pytest.mark.parametrize("url", DATABASES, indirect=True)
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


def submit(door: TestClient, key: str | None = None, **fields: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return door.post("/train/sft", json=ASKED | fields, headers=headers)


# one key, one job


@both
def test_a_hundred_requests_with_one_key_make_one_job(door: TestClient) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: submit(door, "the-one"), range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(door.get("/jobs").json()) == 1
    again = submit(door, "the-one", seed=7)
    assert (again.status_code, len(door.get("/jobs").json())) == (422, 1)


@both
def test_a_replay_is_answered_though_the_request_would_be_refused_by_now(door: TestClient) -> None:
    first = submit(door, "k")
    (hub_of(door).workspace / "data" / "chat.jsonl").unlink()
    assert submit(door).status_code == 404
    assert submit(door, "other").status_code == 404
    assert submit(door, "k").json() == first.json()


@both
def test_replays_take_nothing_of_the_quota(tmp_path: Path, url: str) -> None:
    with open_door(make_workspace(tmp_path), database_url=url, max_queued_jobs=2) as door:
        first = submit(door, "a").json()
        for _ in range(5):
            assert submit(door, "a").json() == first
        assert submit(door, "b").status_code == 200
        assert submit(door, "c").status_code == 429
        assert submit(door, "a").json() == first


@both
def test_of_many_at_once_each_is_taken_or_refused_for_itself(tmp_path: Path, url: str) -> None:
    """They are written together, and one by one where that fails: the quota is met exactly."""
    with open_door(make_workspace(tmp_path), database_url=url, max_queued_jobs=10) as door:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(submit, door, f"k{number % 30}") for number in range(60)]
            answers = [one.result() for one in asked]
        taken = {answer.json()["job_id"] for answer in answers if answer.status_code == 200}
        assert {answer.status_code for answer in answers} == {200, 429}
        assert len(taken) == len(door.get("/jobs").json()) == 10


@both
def test_many_written_together_are_what_each_would_be_alone(tmp_path: Path, url: str) -> None:
    with contextlib.closing(Ledger(tmp_path, url).store) as store:
        news = [new_job(owner="가" if number % 2 else "b", label="🎉") for number in range(100)]
        given: dict[str, Any] = {"max_unfinished": 51, "outputs_root": "/ws/outputs"}
        alone = [store.write(lambda tx, one=one: jobs.submit(tx, one, **given)) for one in news[:2]]
        for future in alone:
            future.result()
        many = store.write(lambda tx: jobs.submit_many(tx, news[2:], **given)).result()
        found = {job.id: job for job in store.read(jobs.list_jobs)}
        assert [found[job.id] for job in many] == many
        one, other = alone[0].result(), many[0]
        drawn = {"id", "output_dir", "created_at", "not_before"}
        assert one.model_dump(exclude=drawn) == other.model_dump(exclude=drawn)
        for job in (one, other):
            told = store.read(lambda tx, job_id=job.id: events.after(tx, job_id))
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


@both
def test_killed_as_soon_as_the_row_is_there_the_retry_brings_that_job(house: House) -> None:
    asking = Asking(house, "key-after")
    asking.start()
    found = wait_for(lambda: job_ids(house))
    kill(house)
    asking.join()
    assert asking.job_id in (None, *found)
    assert retried(house, "key-after") == found[0]
    assert job_ids(house) == found


@both
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


@both
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
    if "TUNESMITH_DATABASE_URL" in house.over:
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


def wait_for(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


# what is remembered is never stale


def is_known(door: TestClient) -> bool:
    """Whether the next request is answered from memory."""

    async def ask() -> bool:
        known, who = hub_of(door).known, Principal.local()
        try:
            known.base(ASKED["model_name"], who, "")
            known.pinned(ASKED["dataset_path"], who, "")
        except Unknown:
            return False
        return True

    assert door.portal
    return bool(door.portal.call(ask))


def get_known(door: TestClient) -> None:
    time.sleep(2 * SETTLED_NS / 1e9)
    submit(door).raise_for_status()
    assert is_known(door)


def sha256_of(door: TestClient, job_id: str) -> str | None:
    return hub_of(door).store.read(lambda tx: jobs.get(tx, job_id)).dataset.sha256


@on_sqlite
def test_a_data_set_that_changed_is_read_again_at_once(door: TestClient) -> None:
    place = hub_of(door).workspace / "data" / "chat.jsonl"
    place.write_bytes(ROW)
    get_known(door)
    before, found = place.stat(), sha256_of(door, submit(door).json()["job_id"])
    place.write_bytes(ROW.replace(b"a", b"c"))
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time as they were
    changed = sha256_of(door, submit(door).json()["job_id"])
    assert changed != found
    place.write_bytes(b"{not a row}\n")
    assert submit(door).status_code == 422
    place.unlink()
    assert submit(door).status_code == 404


@on_sqlite
def test_a_data_set_whose_pinned_bytes_went_is_pinned_again(door: TestClient) -> None:
    get_known(door)
    for folder in ("data", "blobs"):
        for path in (hub_of(door).settings.home / folder).iterdir():
            path.unlink()
    job_id = submit(door).json()["job_id"]
    job = hub_of(door).store.read(lambda tx: jobs.get(tx, job_id))
    assert Path(job.dataset.path).read_bytes()


@on_sqlite
def test_a_model_that_changed_is_looked_at_again_at_once(door: TestClient) -> None:
    place = hub_of(door).workspace / "models" / "tiny"
    config = (place / "config.json").read_bytes()
    get_known(door)
    (place / "config.json").write_text(json.dumps({**json.loads(config), "auto_map": {}}))
    assert "auto_map" in submit(door).text
    (place / "config.json").write_bytes(config)
    get_known(door)
    (place / "tokenizer.json").rename(place / "aside")
    assert "tokenizer.json" in submit(door).text
    (place / "aside").rename(place / "tokenizer.json")
    get_known(door)
    (place / "model.safetensors").unlink()
    assert submit(door).status_code == 400


@on_sqlite
def test_a_folder_that_was_moved_out_behind_a_link_is_no_longer_taken(
    door: TestClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every stamp inside stays as it was; only the way there is another."""
    get_known(door)
    away = tmp_path_factory.mktemp("away")
    for name in ("models", "data"):
        place = hub_of(door).workspace / name
        place.rename(away / name)
        place.symlink_to(away / name)
        assert submit(door).status_code == 400, name
        place.unlink()
        (away / name).rename(place)
    assert submit(door).status_code == 200


# the door itself


@on_sqlite
def test_what_is_wrong_is_told_as_everywhere(door: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    empty = door.post("/train/sft", headers=json_type)
    missing = {"loc": ["body"], "msg": "Field required", "type": "missing"}
    assert (empty.status_code, empty.json()) == (422, {"detail": [missing]})
    for body in (b"null", b"[]", b'"\xec\x95\x88"', b"{}", b"\xff", b'{"model_name": NaN}'):
        answer = door.post("/train/sft", content=body, headers=json_type)
        assert answer.status_code == 422, body
        assert all(fault["loc"][0] == "body" for fault in answer.json()["detail"])
    both = door.post("/train/sft", json={"x": 1}, headers={"Idempotency-Key": "k" * 256})
    places = [fault["loc"] for fault in both.json()["detail"]]
    assert places[0] == ["header", "idempotency-key"]
    assert ["body", "x"] in places
    assert door.get("/train/sft").status_code == 405
    assert door.post("/train/sft/", json=ASKED).status_code == 307
    assert submit(door, "tab\there").status_code == 400


@on_sqlite
def test_under_a_root_path_a_job_is_taken_too(tmp_path: Path, url: str) -> None:
    with open_door(make_workspace(tmp_path)) as door:
        below = TestClient(door.app, LOCAL, root_path="/tuning", client=("127.0.0.1", 5000))
        assert below.post("/tuning/train/sft", json=ASKED).status_code == 200


@both
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


# the process


def test_with_few_descriptors_the_server_refuses_connections_and_recovers(tmp_path: Path) -> None:
    """Under `ulimit -n 64`, two hundred clients come."""
    house = build(tmp_path)
    command = [sys.executable, "-m", "tunesmith.cli", "api", "--no-worker", "--port", "0"]
    shell = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command]
    environment = os.environ | QUICK | {"TUNESMITH_WORKSPACE": str(tmp_path)}
    with (tmp_path / "server.log").open("ab") as log:
        house.process = subprocess.Popen(shell, env=environment, stdout=log, stderr=log)
    try:
        house.url = house._address()
        crowd = [ask_for_the_list(house) for _ in range(200)]
        statuses = [one.recv(12) for one in crowd]
        assert statuses.count(b"HTTP/1.1 200") >= 8
        assert set(statuses) == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
        for one in crowd:
            one.close()
        assert house.wait(lambda: house.submit())
        assert house.process.poll() is None
    finally:
        house.end()


def ask_for_the_list(house: House) -> socket.socket:
    host, port = house.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), PATIENCE)
    client.sendall(b"GET /jobs?limit=3 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return client


def test_importing_the_application_opens_nothing(tmp_path: Path) -> None:
    code = "from tunesmith.api.app import app; assert callable(app)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_several_processes_of_another_server_share_one_database(tmp_path: Path, url: str) -> None:
    make_workspace(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tunesmith.api.app:app", "--workers", "2"]
    given = {"TUNESMITH_WORKSPACE": str(tmp_path), "TUNESMITH_DATABASE_URL": url}
    with (tmp_path / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=os.environ | QUICK | given, stderr=log, stdout=log
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_for(lambda: is_ready(client))
        for number in range(8):  # each on a connection of its own
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                client.post("/train/sft", json=ASKED).raise_for_status()
                assert len(client.get("/jobs").json()) == number + 1
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(PATIENCE)


def is_ready(client: httpx2.Client) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return client.get("/health/ready").status_code == 200
    return False

"""Webhooks across kills: what was heard but not recorded comes again, under the same id."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from house import House
from receivers import Heard, Receiver
from servers import wait_for
from store_fixtures import new_job
from tunesmith.spec.records import StopMode
from tunesmith.store import jobs, webhooks
from tunesmith.store.database import Store
from tunesmith.store.outbox import TYPES

API = ("api", "--no-worker")
OWNER = "test-key-001"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@contextlib.contextmanager
def served(place: Path, database_url: str) -> Iterator[House]:
    house = House(place, {"TUNESMITH_DATABASE_URL": database_url})
    try:
        yield house.start(*API)
    finally:
        house.end()


def kill(house: House) -> None:
    assert house.process is not None
    house.process.kill()
    house.process.wait()


def listen(store: Store, url: str) -> None:
    types = list(TYPES.values())
    store.write(lambda tx: webhooks.make(tx, OWNER, "알림", url, types)).result()


def owed(house: House) -> set[str]:
    """By what happened, not by what was written for it to be sent."""
    rows = house.query("select job_id, seq from events where type in ('cancelled', 'paused')")
    return {f"evt_{job_id}{seq:08x}" for job_id, seq in rows}


def are_all_delivered(house: House) -> bool:
    return not house.query("select id from outbox where done_at is null")


def test_a_server_killed_before_it_could_record_sends_the_same_message_again(
    tmp_path: Path, database_url: str, receiver: Receiver
) -> None:
    with contextlib.closing(Store.open(database_url)) as store:
        listen(store, receiver.url("/hook"))
        stop_twice(store)
    receiver.holding.add("/hook")
    with served(tmp_path, database_url) as house:
        first = receiver.wait("/hook")[0]
        kill(house)
        receiver.holding.clear()
        house.start(*API)
        wait_for(lambda: are_all_delivered(house), "the record")
        again = receiver.at("/hook")[1]
        assert (again.id, again.body) == (first.id, first.body)
        assert {one.id for one in receiver.at("/hook")} == owed(house)
        check_order(receiver.at("/hook"))


def test_of_two_servers_one_sends_and_the_other_follows_when_it_is_killed(
    tmp_path: Path, fresh_database: Callable[[], str], receiver: Receiver
) -> None:
    """Jobs move by a third process, so that only the database joins the three."""
    database_url = fresh_database()
    places = [tmp_path / "하나", tmp_path / "둘"]
    for place in places:
        place.mkdir()
    with (
        served(places[0], database_url) as one,
        served(places[1], database_url) as two,
        contextlib.closing(Store.open(database_url)) as store,
    ):
        listen(store, receiver.url("/hook"))
        for _ in range(6):
            stop_twice(store)
        receiver.wait("/hook", 12)
        receiver.holding.add("/hook")
        for _ in range(6):
            stop_twice(store)
        receiver.wait("/hook", 13)
        house, other = (one, two) if sender(one) == pid(one) else (two, one)
        assert sender(one) == pid(house)
        kill(house)
        receiver.holding.clear()
        wait_for(lambda: are_all_delivered(other), "the other server")
        assert {each.id for each in receiver.at("/hook")} == owed(other)
        assert len(owed(other)) == 24
        assert sender(other) == pid(other)
        check_order(receiver.at("/hook"))


def pid(house: House) -> int:
    assert house.process is not None
    return house.process.pid


def sender(house: House) -> int:
    """The process that has the duty."""
    found = house.query("select host from servers join duties on id = holder where name = 'outbox'")
    return int(found[0][0]["pid"])


def stop_twice(store: Store) -> None:
    """Paused, then cancelled: two messages."""
    new = new_job(owner=OWNER)
    job = store.write(
        lambda tx: jobs.submit(tx, new, max_unfinished=10_000, outputs_root="/ws/outputs")
    ).result()
    for mode in (StopMode.PAUSE, StopMode.CANCEL):
        store.write(lambda tx, mode=mode: jobs.request_stop(tx, job.id, mode, 1)).result()  # type: ignore[misc]


def check_order(heard: list[Heard]) -> None:
    """A message may come twice; none comes after one that tells of what was later."""
    told: dict[str, list[str]] = {}
    for one in heard:
        body = json.loads(one.body)
        told.setdefault(body["data"]["id"], []).append(body["type"])
    for types in told.values():
        assert types == sorted(types, reverse=True), types

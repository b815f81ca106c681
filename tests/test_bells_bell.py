"""The bell's own side: it never waits, never fails a commit, and rings once for many."""

import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from servers import Redis, open_redis, wait_for
from store_fixtures import Ledger
from tunesmith.hub.bell import Bell
from tunesmith.settings import Settings
from tunesmith.work import rings

QUEUE = frozenset({"queue", "job:0badcafe"})


@pytest.fixture
def redis(tmp_path: Path):  # type: ignore[no-untyped-def]
    with open_redis(tmp_path / "redis") as server:
        yield server


def open_bell(url: str) -> Bell:
    bell = Bell.of(Settings.read({}, bell="celery", redis_url=url))
    bell.start()
    return bell


class Ear:
    """Hears every message that is published."""

    def __init__(self, server: Redis) -> None:
        from redis import Redis as Client

        self.client = Client(port=server.port)
        self.heard: Any = self.client.pubsub()  # type: ignore[no-untyped-call]
        self.heard.psubscribe("*")
        assert self.next() is not None  # the subscription itself

    def next(self, seconds: float = 30) -> object:
        return self.heard.get_message(timeout=seconds)

    def count(self) -> int:
        """Until there is silence for a while."""
        found = 0
        while self.next(1.0) is not None:
            found += 1
        return found

    def close(self) -> None:
        self.heard.close()
        self.client.close()


def test_many_commits_share_a_ring_and_other_topics_ring_nothing(redis: Redis) -> None:
    ear, bell = Ear(redis), open_bell(redis.url)
    for _ in range(10_000):
        bell.hear(QUEUE)
        bell.hear(frozenset({"job:0badcafe"}))
    assert ear.next() is not None  # once the bell has imported what it rings with
    assert ear.count() < 999
    bell.hear(frozenset({"job:0badcafe", "worker:w"}))
    assert ear.count() == 0
    assert ear.client.keys() == []  # nothing is left behind that could pile up
    bell.close()
    ear.close()


def test_a_commit_that_queues_a_job_rings(redis: Redis, ledger: Ledger) -> None:
    ear, bell = Ear(redis), open_bell(redis.url)
    ledger.store.on_commit(bell.hear)
    ledger.submit()
    assert "tunesmith.ring" in str(ear.next())
    bell.close()
    ear.close()


def test_a_broker_that_is_down_is_told_of_once_and_found_again(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    redis.stop()
    bell = open_bell(redis.url)
    for _ in range(5):
        bell.hear(QUEUE)
        time.sleep(0.1)
    wait_for(lambda: "can't ring" in caplog.text, "the bell's complaint")
    redis.start()

    def is_back() -> bool:
        bell.hear(QUEUE)
        return "rings again" in caplog.text

    wait_for(is_back, "the bell")
    assert caplog.text.count("can't ring") == 1
    bell.close()


def test_a_broker_that_says_nothing_holds_up_no_commit(ledger: Ledger) -> None:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        bell = open_bell(f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
        ledger.store.on_commit(bell.hear)
        for _ in range(100):
            ledger.submit()
        bell.close()


def test_a_message_carries_nothing_but_its_name(redis: Redis) -> None:
    ear = Ear(redis)
    rings.Ringer(redis.url).ring()
    said = str(ear.next())
    assert '"content-type": "application/json"' in said
    assert '"argsrepr": "()"' in said
    assert '"kwargsrepr": "{}"' in said
    ear.close()

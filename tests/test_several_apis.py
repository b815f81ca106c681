"""Two API processes on one PostgreSQL and one workspace: either will do, and one may die."""

import json
from collections.abc import Callable, Iterator

import pytest

from house import House, build

SLOW = {"num_epochs": 20, "save_steps": 20, "lora_dropout": 0.1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, fresh_database: Callable[[], str]
) -> Iterator[tuple[House, House]]:
    """The first has started last, so that the worker talks to it."""
    other = build(
        tmp_path_factory.mktemp("several"),
        TUNESMITH_DATABASE_URL=fresh_database(),
        TUNESMITH_LEASE_SECONDS="30",
    )
    first = House(other.workspace, other.over)
    try:
        other.start("api", "--no-worker")
        first.start("up")
        yield first, other
    finally:
        first.end()
        other.end()


def check_history(house: House, job_id: str) -> list[str]:
    """Every number once, and one end. Returns the types of the events."""
    events = house.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    words = [event["type"] for event in events]
    assert sum(word in ("succeeded", "failed", "cancelled") for word in words) == 1
    return words


def test_a_job_submitted_at_one_is_followed_and_cancelled_at_the_other(
    pair: tuple[House, House],
) -> None:
    first, other = pair
    assert json.loads((first.home / "api.json").read_bytes())["url"] == first.url != other.url
    job_id = first.submit(**SLOW)
    other.wait_event(job_id, "step")
    with other.client as client:
        assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert first.wait_end(job_id)["status"] == "cancelled"
    assert "validated" in check_history(other, job_id)
    assert first.events(job_id) == other.events(job_id)


def test_the_workers_of_the_house_are_known_to_both(pair: tuple[House, House]) -> None:
    first, other = pair
    for house in (first, other):
        with house.client as client:
            house.wait(lambda client=client: client.get("/health").json().get("workers") == 1)
    rows = first.query("select count(*) from servers")
    assert rows[0][0] == 2
    duties = dict(first.query("select name, holder from duties"))
    assert "checks" in duties


def test_a_job_goes_on_at_the_other_after_its_api_was_killed(pair: tuple[House, House]) -> None:
    first, other = pair
    job_id = other.submit(**SLOW)
    trainer = other.trainer(job_id)
    assert first.process is not None
    first.process.kill()
    first.process.wait()
    waiting = other.submit(max_steps=2)  # whose check was the other's duty, maybe
    place = first.home / "api.json"
    other.wait(lambda: json.loads(place.read_bytes())["url"] == other.url)
    assert other.wait_end(job_id)["status"] == "completed"
    assert other.job(job_id)["attempts"] == 1, "its worker has found the other API in time"
    assert not trainer.is_running() or trainer.status() == "zombie"
    check_history(other, job_id)
    assert other.wait_end(waiting)["status"] == "completed"
    check_history(other, waiting)

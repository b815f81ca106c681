"""Clocks are set, servers sleep: no lease is lost by it, and none lives for ever."""

import asyncio
from pathlib import Path

import pytest

from store_fixtures import LEASE, Ledger, new_ask
from tunesmith.hub import Hub
from tunesmith.hub.leases import Leases
from tunesmith.settings import Settings
from tunesmith.spec.records import JobState, StopMode
from tunesmith.store import claims, servers
from tunesmith.store.clock import FOLLOW_RATE, SteadyClock

HOUR = 3600.0
PACE = 5.0


class Host:
    """Its wall clock, and the time since it was started: seconds."""

    def __init__(self) -> None:
        self.wall, self.running = 1_000_000.0, 50.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.running += seconds


def steady(host: Host) -> SteadyClock:
    return SteadyClock(lambda: host.wall, lambda: host.running)


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_step_of_the_wall_moves_no_lease_and_is_followed_slowly(step: float) -> None:
    host = Host()
    clock = steady(host)
    before = clock()
    host.wall += step
    assert clock() == before
    host.pass_by(60)
    assert abs(clock() - before - 60) <= 60 * FOLLOW_RATE + 1e-6
    last = clock()
    for _ in range(25 * 60):
        host.pass_by(60)
        assert clock() > last
        last = clock()
    assert clock() == pytest.approx(host.wall)


def test_without_a_step_the_clock_is_the_wall_s() -> None:
    host = Host()
    clock = steady(host)
    for _ in range(100):
        host.pass_by(0.1)
        assert clock() == pytest.approx(host.wall, abs=1e-6)


@pytest.fixture
def house(ledger: Ledger, tmp_path: Path) -> "House":
    return House(ledger, tmp_path)


class House:
    """A hub over the ledger, whose host has a clock of its own."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.ledger = ledger
        settings = Settings(workspace=folder, lease_seconds=LEASE, reaper_seconds=PACE)
        settings.home.mkdir(exist_ok=True)
        self.hub = Hub(settings, ledger.store)
        self.running = 0.0
        self.leases = Leases(self.hub, lambda: self.running)

    def pass_by(self, seconds: float) -> None:
        self.ledger.clock.pass_by(seconds)
        self.running += seconds

    def turn(self, beats: float = 0.0) -> None:
        """Keep house once; `beats` seconds before it, time passes."""
        self.pass_by(beats)
        asyncio.run(self.leases.turn())


def test_a_silent_worker_s_job_is_taken_back_after_its_lease(house: House) -> None:
    job = house.ledger.start()
    for _ in range(int(LEASE / PACE) - 1):
        house.turn(PACE)
    assert house.ledger.get(job.id).state is JobState.RUNNING
    for _ in range(3):
        house.turn(PACE)
    assert house.ledger.get(job.id).state is JobState.QUEUED


@pytest.mark.parametrize("step", [HOUR, -HOUR, 3.0 + LEASE])
def test_a_clock_that_is_set_takes_no_job_from_its_worker_and_gives_none_for_ever(
    house: House, step: float
) -> None:
    job = house.ledger.start()
    house.turn()
    house.turn(PACE)
    house.ledger.clock.pass_by(step)
    house.turn(PACE)
    held = house.ledger.get(job.id)
    assert held.state is JobState.RUNNING
    assert held.lease_until == house.ledger.clock.now + LEASE
    for _ in range(int(LEASE / PACE) + 2):
        house.turn(PACE)
    assert house.ledger.get(job.id).state is JobState.QUEUED


def test_a_clock_set_back_lets_nothing_wait_for_longer_than_it_was_told_to(house: House) -> None:
    ledger = house.ledger
    job = ledger.start()
    ledger.stop(job.id, StopMode.CANCEL, grace_seconds=30)
    waiting = ledger.submit()
    ledger.write(lambda tx: claims.seen_worker(tx, new_ask("w7")))
    house.turn()
    ledger.clock.pass_by(-HOUR)
    house.turn(PACE)
    deadline = ledger.get(job.id).stop_deadline
    assert deadline is not None
    assert deadline <= ledger.clock.now + house.hub.settings.grace_seconds
    assert ledger.get(waiting.id).not_before <= ledger.clock.now + 300
    house.pass_by(300)
    assert ledger.store.read(lambda tx: claims.count_workers(tx, 90)) == 0


def test_a_server_that_slept_or_came_late_lets_the_workers_come_back(house: House) -> None:
    job = house.ledger.start()
    house.turn(10 * LEASE)  # its first turn: it has just been started
    assert house.ledger.get(job.id).state is JobState.RUNNING
    house.turn(PACE)
    house.turn(10 * LEASE)  # it slept
    assert house.ledger.get(job.id).state is JobState.RUNNING


def test_beside_another_server_a_late_one_judges_leases_as_they_are(house: House) -> None:
    job = house.ledger.start()
    house.pass_by(10 * LEASE)
    house.ledger.write(lambda tx: servers.seen(tx, "other", {}))
    house.turn()
    is_alone = house.ledger.store.is_alone
    state = JobState.RUNNING if is_alone else JobState.QUEUED
    assert house.ledger.get(job.id).state is state

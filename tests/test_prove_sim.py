"""The simulator: some schedules on both databases, and a guard taken out is missed."""

from importlib import util

import pytest

from prove.sim import _processes
from prove.sim.mutants import MUTANTS, Mutant
from prove.sim.worker import Played, first_fault, play_all
from servers import Postgres


def broken(played: list[Played]) -> list[Played]:
    return [one for one in played if one.faults]


def test_schedules_on_sqlite_have_no_fault() -> None:
    played = play_all(range(1, 31), "sqlite://")
    assert broken(played) == []
    assert min(one.acts for one in played) > 50


def test_schedules_on_postgresql_have_no_fault(postgres: Postgres) -> None:
    assert broken(play_all(range(1, 9), postgres.database())) == []


def test_the_loss_of_a_guard_is_noticed() -> None:
    with _processes(tasks=1) as pool:
        found = pool.submit(first_fault, range(1, 200), "the fence stays at a claim").result()
    assert found is not None
    assert found.faults


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_guard_that_is_taken_out_is_there(mutant: Mutant) -> None:
    spec = util.find_spec(f"tunesmith.store.{mutant.module}")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as source:
        assert source.read().count(mutant.before) == 1

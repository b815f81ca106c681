"""The simulator: some schedules on both databases, and a guard taken out is missed."""

from importlib import util
from pathlib import Path

import pytest

from prove.sim import Stage, _play, _processes
from prove.sim.mutants import MUTANTS, Mutant
from prove.sim.tally import Sum, Tally
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


def test_a_run_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    def played(record: Path, count: int) -> list[Sum]:
        stage = Stage("sqlite", lambda: "sqlite://", Tally(record))
        with _processes() as pool:
            return list(_play(pool, 1, count, stage, lambda *_: None))

    record = tmp_path / "record"
    first = played(record, 2)
    lines = record.read_text().splitlines()
    assert first == [Sum.of(play_all(range(1, 3), "sqlite://"))]
    assert played(record, 2) == first
    assert record.read_text().splitlines() == lines
    assert Tally(record, code="other").known("sqlite", range(1, 3)) is None
    assert Tally(None).known("sqlite", range(1, 3)) is None


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

"""A process of its own: plays schedules over the store as it is, or with one guard taken out."""

from collections.abc import Iterator
from typing import NamedTuple


class Played(NamedTuple):
    seed: int
    faults: tuple[str, ...]
    acts: int


def play(seeds: range, mutant_name: str = "", url: str = "sqlite://") -> Iterator[Played]:
    """One schedule a seed. The store is imported here, with its guard taken out where asked."""
    if mutant_name:
        from prove.sim.mutants import MUTANTS, install

        install(next(one for one in MUTANTS if one.name == mutant_name))
    from prove.sim.floor import Floor
    from prove.sim.world import World
    from store_fixtures import Clock
    from tunesmith.store.database import Store

    clock = Clock()
    store = Store.open(url, clock=clock)
    floor = Floor(store)
    try:
        for seed in seeds:
            before, world = floor.acts, World(floor, clock, seed)
            yield Played(seed, tuple(world.play()), floor.acts - before)
    finally:
        floor.close()
        store.close()


def play_all(seeds: range, url: str) -> list[Played]:
    return list(play(seeds, url=url))


def first_fault(seeds: range, mutant_name: str) -> Played | None:
    """The first schedule that shows that the guard is missing; None where none does."""
    return next((played for played in play(seeds, mutant_name) if played.faults), None)

"""Thousands of schedules of the store under a virtual clock, and the loss of each guard noticed."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from prove.proof import Figure, Progress, Result, Setting
from prove.sim.mutants import MUTANTS
from prove.sim.tally import Sum, Tally
from prove.sim.worker import first_fault, play_all
from servers import open_postgres

BATCH = 50
MUTANT_SEEDS = 1000


@dataclass(frozen=True)
class Stage:
    """What schedules are played on."""

    name: str
    database: Callable[[], str]
    tally: Tally


def run(setting: Setting, show: Progress) -> Result:
    total = setting.count(5_000, 50_000)
    on_postgres = setting.count(200, 2_000)
    figures: list[Figure] = []
    tally = Tally(setting.record)
    with _processes() as pool:
        if "sqlite" in setting.databases:
            stage = Stage("sqlite", lambda: "sqlite://", tally)
            played = list(_play(pool, setting.seed, total, stage, show))
            figures.append(_schedules("SQLite", played))
        if "postgresql" in setting.databases:
            with open_postgres(setting.folder / "postgres") as cluster:
                stage = Stage("postgresql", cluster.database, tally)
                played = list(_play(pool, setting.seed, on_postgres, stage, show))
            figures.append(_schedules("PostgreSQL", played))
    figures.append(_guards(setting.seed, show))
    return Result(tuple(figures))


def _processes(tasks: int | None = None) -> ProcessPoolExecutor:
    """Fresh ones: each imports the store as it should be, or without a guard."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        os.cpu_count(),
        mp_context=context,
        max_tasks_per_child=tasks,
        initializer=os.nice,
        initargs=(19,),
    )


def _play(
    pool: ProcessPoolExecutor, seed: int, count: int, stage: Stage, show: Progress
) -> Iterator[Sum]:
    """A database of its own for each batch."""
    waiting, done = {}, 0
    for start in range(seed, seed + count, BATCH):
        batch = range(start, min(start + BATCH, seed + count))
        known = stage.tally.known(stage.name, batch)
        if known is None:
            waiting[pool.submit(play_all, batch, stage.database())] = batch
            continue
        done += known.schedules
        yield known
    for future in as_completed(waiting):
        found = Sum.of(future.result())
        stage.tally.keep(stage.name, waiting[future], found)
        done += found.schedules
        show(done, count, f"{done} schedules")
        yield found


def _schedules(name: str, batches: list[Sum]) -> Figure:
    broken = [one for batch in batches for one in batch.broken]
    schedules, acts = sum(one.schedules for one in batches), sum(one.acts for one in batches)
    told = f"{schedules} schedules, {acts} acts, {len(broken)} broken"
    if broken:
        seed, fault = min(broken)
        told += f"; seed {seed}: {fault}"
    return Figure(f"schedules on {name}", "0 violations", told, not broken)


def _guards(seed: int, show: Progress) -> Figure:
    """Each guard taken out; how many schedules it took to notice."""
    caught: dict[str, int] = {}
    with _processes(tasks=1) as pool:
        seeds = range(seed, seed + MUTANT_SEEDS)
        waiting = {pool.submit(first_fault, seeds, one.name): one.name for one in MUTANTS}
        for number, future in enumerate(as_completed(waiting), 1):
            found = future.result()
            if found is not None:
                caught[waiting[future]] = found.seed - seed + 1
            show(number, len(MUTANTS), f"the loss of {len(caught)} of {number} guards noticed")
    unseen = [one.name for one in MUTANTS if one.name not in caught]
    slowest = max(caught.values(), default=0)
    told = f"{len(caught)} of {len(MUTANTS)}, each within {slowest} schedules"
    if unseen:
        told += "; not noticed: " + ", ".join(unseen)
    return Figure("guards whose loss is noticed", "100 % of at least 12", told, not unseen)

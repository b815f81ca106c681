"""What all actors of a simulation share: the store's floor, the clock, the dice, the oracle."""

import contextlib
from collections.abc import Callable
from random import Random
from typing import TypeVar

from sqlalchemy.engine import Connection

from prove.sim.floor import Floor
from prove.sim.oracle import Oracle
from store_fixtures import Clock

T = TypeVar("T")
LEASE, MAX_LAPSES, BACKOFF = 60.0, 3, 1.0


class _RolledBack(Exception):
    """A commit that failed after its work was done: the group is run again."""


class Stage:
    def __init__(self, floor: Floor, clock: Clock, seed: int) -> None:
        self.floor, self.clock, self.random = floor, clock, Random(seed)
        self.oracle = Oracle(clock, LEASE, MAX_LAPSES)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def do(
        self,
        act: str,
        work: Callable[[Connection], T],
        told: Callable[[T], None] | None = None,
        may: tuple[type[Exception], ...] = (),
    ) -> bool:
        """Run a piece of work, sometimes a second time after its commit failed. False: refused."""
        if self.chance(0.03):
            self._do_in_vain(work, may)
        try:
            answer = self.floor.write(work)
        except may:
            self.oracle.look(self.floor.rows, act)
            return False
        if told is not None:
            told(answer)
        self.oracle.look(self.floor.rows, act)
        return True

    def _do_in_vain(
        self, work: Callable[[Connection], T], may: tuple[type[Exception], ...]
    ) -> None:
        def undone(tx: Connection) -> None:
            work(tx)
            raise _RolledBack

        with contextlib.suppress(_RolledBack, *may):
            self.floor.write(undone)

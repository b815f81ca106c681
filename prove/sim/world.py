"""A house in miniature under a virtual clock: a seeded hand moves users, workers, network, server.

The store's own statements run; everything else is acted.
"""

from collections.abc import Callable

from prove.sim.floor import Floor
from prove.sim.hands import Registry, Worker
from prove.sim.network import Network
from prove.sim.oracle import FINAL
from prove.sim.server import Server
from prove.sim.stage import LEASE, Stage
from prove.sim.users import Users
from store_fixtures import Clock

STEPS, CALM_ROUNDS = 140, 300
GPUS = {"w0": (), "w1": (0, 1), "w2": ()}


class World:
    def __init__(self, floor: Floor, clock: Clock, seed: int) -> None:
        self.stage = Stage(floor, clock, seed)
        self.users = Users(self.stage)
        self.server = Server(self.stage)
        self.network = Network(self.stage, self.server)
        registry = Registry()
        self.workers = [
            Worker(name, gpus, self.stage, self.network, registry) for name, gpus in GPUS.items()
        ]

    def play(self) -> list[str]:
        """The sentences of all that went wrong; empty where nothing did."""
        oracle = self.stage.oracle
        self.stage.floor.wipe()
        self.stage.clock.now = 1_000_000.0 + self.stage.random.random()
        try:
            for _ in range(STEPS):
                self._chaos()
                if oracle.faults:
                    return oracle.faults
            self._calm()
            oracle.final()
        except Exception as error:  # whatever it is, no act of a world may raise it
            oracle.fault(f"unexpected {type(error).__name__}: {str(error)[:300]}")
        return oracle.faults

    def _chaos(self) -> None:
        """An act, after some time has passed."""
        random, clock = self.stage.random, self.stage.clock
        clock.pass_by(random.choice((0.05, 0.5, 1, 2, 5, 12)))
        if self.stage.chance(0.02):
            clock.pass_by(random.choice((30, 70, 200)))
        self.network.deliver()
        worker = random.choice(self.workers)
        acts: tuple[Callable[[], None], ...] = (
            self.users.act,
            self.server.act,
            worker.act,
            worker.suffer,
        )
        random.choices(acts, (15, 12, 65, 8))[0]()

    def _calm(self) -> None:
        """No more faults: whatever was accepted must come to an end."""
        books = self.stage.oracle.books
        self.stage.clock.pass_by(LEASE * 4)
        self.network.is_calm = True
        self.server.come_back()
        for worker in self.workers:
            worker.line.frozen_until = worker.line.cut_until = 0.0
        for _ in range(CALM_ROUNDS):
            self.network.deliver()
            if all(book.state in FINAL for book in books.values()):
                return
            self._calm_round()
            self.stage.clock.pass_by(self.stage.random.choice((2, 4)))

    def _calm_round(self) -> None:
        if not self.server.is_down:
            self.server.reap()
            self.server.validate(is_good=True)
        for job_id, book in self.stage.oracle.books.items():
            if book.state == "paused":
                self.users.resume(job_id)
        for worker in self.workers:
            worker.ask()
            for run in list(worker.runs.values()):
                run.is_stubborn = False
                worker.train(run)
                worker.report(run)

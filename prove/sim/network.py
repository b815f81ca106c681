"""The line between workers and server: it delays, repeats and loses, both ways."""

from collections.abc import Callable
from dataclasses import dataclass, field

from prove.sim.server import Server
from prove.sim.stage import Stage

Answer = Callable[[], None]
Request = Callable[[], Answer | None]
"""Done at the server; the answer is taken by the worker, if it gets there."""


@dataclass
class Line:
    """A worker's end: its process may have gone, frozen, or be cut off."""

    boot: int = 1
    frozen_until: float = 0.0
    cut_until: float = 0.0


@dataclass(order=True)
class _Letter:
    at: float
    number: int
    line: Line = field(compare=False)
    boot: int = field(compare=False)
    request: Request = field(compare=False)


class Network:
    def __init__(self, stage: Stage, server: Server) -> None:
        self.stage, self.server = stage, server
        self.is_calm = False
        self._letters: list[_Letter] = []
        self._sent = 0

    def send(self, line: Line, request: Request) -> None:
        """Now, later, twice, or never."""
        now, random = self.stage.clock.now, self.stage.random
        copies = 1 if self.is_calm else random.choices((0, 1, 2), (8, 82, 10))[0]
        for _ in range(copies):
            delay = 0.0 if self.is_calm else random.choice((0, 0, 0, 0.5, 8, 90))
            self._sent += 1
            at = max(now + delay, line.cut_until)
            self._letters.append(_Letter(at, self._sent, line, line.boot, request))
        self.deliver()

    def deliver(self) -> None:
        """All that is due, oldest first, while the server is there."""
        while self._letters and not self.server.is_down:
            letter = min(self._letters)
            if letter.at > self.stage.clock.now:
                return
            self._letters.remove(letter)
            answer = letter.request()
            is_heard = self.is_calm or self.stage.chance(0.9)
            is_there = letter.line.boot == letter.boot
            is_awake = letter.line.frozen_until <= self.stage.clock.now
            if answer is not None and is_heard and is_there and is_awake:
                answer()

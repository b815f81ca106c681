"""SQLite's clock: it starts at the wall's time and follows it slowly, so that a step of the wall
clock moves no lease."""

import threading
import time
from collections.abc import Callable

FOLLOW_RATE = 0.05
"""Seconds that the clock gains or loses on real time in a second, at most, to catch up."""


def running_seconds() -> float:
    """Since the host was started, and through its sleep where the kernel counts that."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class SteadyClock:
    """Unix seconds, never backwards. Any thread may ask.

    An hour's step of the wall is caught up within 20 hours; a lease of a minute is meanwhile wrong
    by three seconds at most.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        running: Callable[[], float] = running_seconds,
    ) -> None:
        self._wall, self._running = wall, running
        self._lock = threading.Lock()
        self._now, self._asked = wall(), running()

    def __call__(self) -> float:
        with self._lock:
            asked = self._running()
            passed = max(0.0, asked - self._asked)
            self._asked = asked
            ahead = self._wall() - (self._now + passed)
            most = FOLLOW_RATE * passed
            self._now += passed + min(max(ahead, -most), most)
            return self._now

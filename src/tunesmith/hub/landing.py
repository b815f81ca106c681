"""From the writer's thread to the server's loop: what one commit finished, in one step.

A step for each result would cost a system call and a switch of threads each.
"""

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Landing:
    """Of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._landed: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._is_due = False

    def awaitable(self, future: "Future[T]") -> "asyncio.Future[T]":
        """As `asyncio.wrap_future`: who stops waiting cancels what was not begun."""
        waiting: asyncio.Future[T] = self.loop.create_future()
        waiting.add_done_callback(partial(_give_up, future))
        future.add_done_callback(partial(self._land, waiting))
        return waiting

    def _land(self, waiting: "asyncio.Future[Any]", future: "Future[Any]") -> None:
        """On the writer's thread. Appended first, looked at second: nothing is left lying."""
        self._landed.append((waiting, future))
        if not self._is_due:
            self._is_due = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._is_due = False
        while self._landed:
            waiting, future = self._landed.popleft()
            if not waiting.done():
                _copy(future, waiting)


def _give_up(future: "Future[Any]", waiting: "asyncio.Future[Any]") -> None:
    if waiting.cancelled():
        future.cancel()


def _copy(future: "Future[Any]", waiting: "asyncio.Future[Any]") -> None:
    if future.cancelled():
        waiting.cancel()
        return
    error = future.exception()
    if error is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(future.result())

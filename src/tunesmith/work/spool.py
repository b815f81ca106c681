"""What a trainer said and the API has not taken yet: in order, numbered once, and bounded."""

from collections import deque
from itertools import count
from typing import Any, NamedTuple

from tunesmith.spec.hands import MAX_EVENTS, NumberedEvent

MAX_HELD = 20_000
"""Kept while the API is away; past it, every second step goes, so that the curve's shape stays."""
MAX_BATCH_BYTES = 4 << 20
_THINNED = ("step", "notice")


class _Line(NamedTuple):
    body: dict[str, Any]
    size: int


class Spool:
    """Events get their number when they are first sent: what goes before leaves no gap.

    A batch stays the same until it is accepted, so that it may be sent twice.
    """

    def __init__(self, first_n: int = 1) -> None:
        self._numbers = count(first_n)
        self._waiting: deque[_Line] = deque()
        self._sent: list[NumberedEvent] = []

    def __len__(self) -> int:
        return len(self._sent) + len(self._waiting)

    def add(self, body: dict[str, Any], size: int = 1) -> None:
        """`size` in bytes, as the trainer wrote it."""
        self._waiting.append(_Line(body, size))
        if len(self._waiting) > MAX_HELD:
            self._thin()

    def batch(self) -> tuple[NumberedEvent, ...]:
        """What to send next."""
        size = 0
        while not self._is_full(size):
            line = self._waiting.popleft()
            size += line.size
            self._sent.append(self._numbered(line))
        return tuple(self._sent)

    def _is_full(self, size: int) -> bool:
        """Of a batch that is being filled; one that was sent before is not touched."""
        if not self._waiting or len(self._sent) >= MAX_EVENTS:
            return True
        return bool(self._sent) and not 0 < size <= MAX_BATCH_BYTES - self._waiting[0].size

    def accept(self, last_n: int) -> bool:
        """Forget what the API has stored. Whether that was all that had been sent."""
        self._sent = [event for event in self._sent if event.n > last_n]
        return not self._sent

    def rest(self) -> tuple[NumberedEvent, ...]:
        """All of it, numbered: for the receipt."""
        self._sent += [self._numbered(line) for line in self._waiting]
        self._waiting.clear()
        return tuple(self._sent)

    def _numbered(self, line: _Line) -> NumberedEvent:
        return NumberedEvent(n=next(self._numbers), event=line.body)

    def _thin(self) -> None:
        kept: deque[_Line] = deque()
        is_second = True
        for line in self._waiting:
            if line.body["type"] in _THINNED:
                is_second = not is_second
                if is_second:
                    continue
            kept.append(line)
        if len(kept) > MAX_HELD:
            kept.popleft()
        self._waiting = kept

"""Whether engines still answer: one that is frozen keeps its connections, and who waits there."""

import asyncio
import time
from collections.abc import Sequence

import httpx2

from tunesmith.store.engines import Engine

LOOK_SECONDS = 5.0
"""For one answer; a busy engine may be slow with it, and is asked again."""


class Pulse:
    """Remembers when each engine last answered. Call from the server's event loop."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._answered: dict[str, float] = {}
        """Monotonic seconds; for a new engine, since when it is watched."""

    async def silent(self, client: httpx2.AsyncClient, ready: Sequence[Engine]) -> list[Engine]:
        """Ask each engine once. Those that have not answered for longer than our patience."""
        began = time.monotonic()
        self._answered = {row.id: self._answered.get(row.id, began) for row in ready}
        answers = await asyncio.gather(*(self._answers(client, row) for row in ready))
        now = time.monotonic()
        for row, has_answered in zip(ready, answers, strict=True):
            if has_answered:
                self._answered[row.id] = now
        return [row for row in ready if now - self._answered[row.id] > self._patience]

    async def _answers(self, client: httpx2.AsyncClient, row: Engine) -> bool:
        wait = min(LOOK_SECONDS, self._patience)
        try:
            await client.get(f"{row.url}/health", timeout=wait)
        except (httpx2.HTTPError, OSError):
            return False
        return True

"""Leases are judged by the database's clock, unless it was set or nobody could extend them: then
they are granted anew."""

import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.engine import Connection

from tunesmith.spec.records import Job
from tunesmith.store import claims, endings, servers
from tunesmith.store.clock import running_seconds
from tunesmith.store.tables import now

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

STEP_SECONDS = 1.0
"""That a database's clock may differ from this host's between two turns, beside its drift."""
DRIFT = 0.06
"""Of the time between two turns: SQLite's clock follows the wall by so much."""


@dataclass(frozen=True)
class _Look:
    """At the database's clock, between two looks at this host's own. Seconds."""

    before: float
    shown: float
    after: float

    def passed_since(self, last: "_Look") -> float:
        return self.before - last.after

    def step_since(self, last: "_Look") -> float:
        """How far the clock was set, either way; 0 for what the looks' own time may explain."""
        shown = self.shown - last.shown
        slack = STEP_SECONDS + DRIFT * abs(self.passed_since(last))
        ahead = shown - (self.after - last.before)
        behind = self.passed_since(last) - shown
        return max(0.0, ahead - slack, behind - slack)


class Leases:
    """One a server; all servers of a house take turns, and none harms another's."""

    def __init__(self, hub: "Hub", running: Callable[[], float] = running_seconds) -> None:
        self._hub = hub
        self._running = running
        self._last: _Look | None = None
        self.next_seconds = math.inf
        """From the last turn until a lease lapses that is not extended before."""

    async def turn(self) -> None:
        """Take back what lapsed; or, after a time in which workers could not be heard, grant."""
        is_first = self._last is None
        self.next_seconds = math.inf
        look, why, lapsed, self.next_seconds = await self._hub.write(self._work)
        self._last = look
        if why and not is_first:
            log.warning("%s: leases are extended", why)
        for job in lapsed:
            log.warning("job %s: its lease lapsed; now %s", job.id, job.state)

    async def grant(self) -> None:
        """Give every worker a whole lease's time to come back."""
        await self._hub.write(self._grant)

    def _work(self, tx: Connection) -> tuple[_Look, str, list[Job], float]:
        before = self._running()
        look = _Look(before, tx.scalar(select(now())) or 0.0, self._running())
        why = self._why_grant(look, self._was_served(tx))
        settings = self._hub.settings
        if why:
            self._grant(tx)
            return look, why, [], endings.next_lapse(tx)
        lapsed = endings.reap(
            tx, max_lapses=settings.max_lapses, backoff_seconds=settings.backoff_seconds
        )
        return look, why, lapsed, endings.next_lapse(tx)

    def _was_served(self, tx: Connection) -> bool:
        """Whether another server was there lately for the workers; this one is there now."""
        if self._hub.store.is_alone:
            return False
        own = self._hub.duties.holder
        others = servers.others(tx, own, self._hub.settings.lease_seconds / 4)
        servers.seen(tx, own, {"name": socket.gethostname(), "pid": os.getpid()})
        servers.sweep(tx)
        return bool(others)

    def _why_grant(self, look: _Look, was_served: bool) -> str:
        """Empty where leases are to be judged."""
        if self._last is None:
            return "" if was_served else "the house has opened"
        if step := look.step_since(self._last):
            return f"the database's clock was set by {step:.0f} s or more"
        settings = self._hub.settings
        passed = look.passed_since(self._last)
        if passed > settings.reaper_seconds + settings.lease_seconds / 4 and not was_served:
            return f"nobody kept house for {passed:.0f} s"
        return ""

    def _grant(self, tx: Connection) -> None:
        settings = self._hub.settings
        claims.grant_grace(
            tx,
            settings.lease_seconds,
            grace_seconds=settings.grace_seconds,
            backoff_seconds=endings.MAX_BACKOFF_SECONDS,
        )
        claims.set_back(tx)

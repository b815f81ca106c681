"""What one API process does for all that share the database: who does it now."""

import logging
import secrets
import time
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith.errors import NotReadyError
from tunesmith.store import duties, servers

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

MAX_SECONDS = 15.0


class Duties:
    """One a server. A duty may for a moment have two holders, where one was frozen in mid-turn."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self.holder = "server-" + secrets.token_hex(8)
        """Names this process in rows."""
        self._until: dict[str, float] = {}
        """Monotonic seconds."""

    @property
    def _seconds(self) -> float:
        return min(MAX_SECONDS, self._hub.settings.lease_seconds)

    async def has(self, name: str) -> bool:
        """Take the duty or keep it; a commit only where half of its lease has passed."""
        if self._hub.store.is_alone:
            return True
        asked, seconds = time.monotonic(), self._seconds
        if asked < self._until.get(name, 0.0) - seconds / 2:
            return True
        if not self._hub.store.read(lambda tx: duties.may_take(tx, name, self.holder)):
            self._until.pop(name, None)
            return False
        if not await self._hub.write(lambda tx: duties.take(tx, name, self.holder, seconds)):
            return False
        self._until[name] = asked + seconds
        return True

    async def release(self) -> None:
        """At the end of this process: another need not wait until it is missed."""
        if self._hub.store.is_alone:
            return
        self._until.clear()

        def work(tx: Connection) -> None:
            duties.release(tx, self.holder)
            servers.leave(tx, self.holder)

        try:
            await self._hub.write(work)
        except NotReadyError as away:
            log.warning("the duties of this server were not given back: %s", away)

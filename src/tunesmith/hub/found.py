"""What names stand for, remembered for a moment: a busy model is not looked up for each request."""

import asyncio
import time
from typing import TYPE_CHECKING

from tunesmith.errors import NotFoundError
from tunesmith.hub.answers import Target
from tunesmith.hub.foreign import Foreign
from tunesmith.hub.names import FoundModel
from tunesmith.hub.principal import Principal

if TYPE_CHECKING:
    from tunesmith.hub import Hub

FOUND_SECONDS = 0.5
_MAX_FOUND = 1000


class Found:
    """What is not there is looked for each time, and every commit here ends the memory."""

    def __init__(self, hub: "Hub", foreign: Foreign) -> None:
        self._hub = hub
        self._foreign = foreign
        self._known: dict[tuple[object, ...], tuple[float, FoundModel | Target]] = {}
        hub.store.on_commit(lambda _: self._known.clear())

    async def find(self, model: str, who: Principal, field: str) -> FoundModel | Target:
        """A model of the house, or where one of somebody else's answers. Raises NotFoundError,
        BadRequestError; NotReadyError while somebody else is away."""
        now, key = time.monotonic(), (model, who.owner, who.sees_all, field)
        seen = self._known.get(key)
        if seen is not None and now - seen[0] < FOUND_SECONDS:
            return seen[1]
        found: FoundModel | Target | None
        try:
            found = await asyncio.to_thread(self._hub.find_model, model, who, field)
        except NotFoundError:
            found = await self._foreign.named(model)
            if found is None:
                raise
        if len(self._known) > _MAX_FOUND:
            self._known.clear()
        self._known[key] = (now, found)
        return found

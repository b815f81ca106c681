"""What one engine process serves now, and what all of its routes share."""

import asyncio
from dataclasses import dataclass, field

from fastapi import Request

from tunesmith.errors import NotReadyError
from tunesmith.infer.engine import Engine
from tunesmith.infer.voices import Voice, Voices


@dataclass(eq=False)
class Served:
    """One model in memory, and all that answers for it."""

    engine: Engine
    base: Voice
    """Named in no request where an adapter alone was asked for, but kept for later ones."""
    voices: Voices
    model_name: str
    """The name that it was loaded under."""
    users: int = 0
    """Requests that hold it; it goes with the last of them."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One adapter is loaded or unloaded at a time."""

    def let_go(self) -> None:
        """A request that took it is over."""
        self.users -= 1


class House:
    """Only the event loop changes it."""

    def __init__(
        self, served: Served | None, key: str = "", max_body_bytes: int = 16 << 20
    ) -> None:
        self.served = served
        self.key = key
        self.max_body_bytes = max_body_bytes

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.served is not None:
            self.served.engine.start(loop)

    def close(self) -> None:
        if self.served is not None:
            self.served.engine.close()

    async def take(self, request: Request) -> Served:
        """The model that answers this request, to its end, whatever is loaded meanwhile.

        Raises NotReadyError (503) where none is. `Door` lets it go.
        """
        if self.served is None:
            raise NotReadyError("no model is loaded; POST /load_model?model_path=… loads one")
        if getattr(request.state, "served", None) is None:
            self.served.users += 1
            request.state.served = self.served
        served: Served = request.state.served
        return served

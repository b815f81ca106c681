"""What one engine process serves now, and how another model takes its place."""

import asyncio
import gc
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from fastapi import Request

from tunesmith.errors import NotReadyError
from tunesmith.infer.engine import Engine
from tunesmith.infer.keyring import Keyring
from tunesmith.infer.voices import Voice, Voices

if TYPE_CHECKING:
    from tunesmith.infer.fellows import Fellows
    from tunesmith.infer.loading import Loader, Wanted

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Served:
    """One model in memory, and all that answers for it."""

    engine: Engine
    base: Voice
    """Named in no request where an adapter alone was asked for, but kept for later ones."""
    voices: Voices
    wanted: "Wanted"
    """What it was loaded as."""
    users: int = 0
    """Requests that hold it; it goes with the last of them."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One adapter is loaded or unloaded at a time."""
    is_free: asyncio.Event = field(default_factory=asyncio.Event)
    _is_started: bool = False

    @property
    def model_name(self) -> str:
        return self.wanted.name

    def start(self) -> None:
        """On the running loop; started again, nothing happens."""
        if not self._is_started:
            self._is_started = True
            self.engine.start(asyncio.get_running_loop())

    def take(self) -> None:
        self.users += 1
        self.is_free.clear()

    def let_go(self) -> None:
        """A request that took it is over."""
        self.users -= 1
        if not self.users:
            self.is_free.set()

    async def end(self) -> None:
        """Once nobody holds it."""
        if self.users:
            await self.is_free.wait()
        await asyncio.to_thread(self.engine.close)


class House:
    """Only the event loop changes it."""

    def __init__(
        self,
        served: Served | None,
        loader: "Loader",
        keyring: Keyring | None = None,
        max_body_bytes: int = 16 << 20,
    ) -> None:
        self.served = served
        self.loader = loader
        self.keyring = keyring or Keyring()
        self.max_body_bytes = max_body_bytes
        self.fellows: Fellows | None = None
        """Other processes that serve the same."""
        self._swap = asyncio.Lock()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._ending: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        if self.served is not None:
            self.served.start()

    def close(self) -> None:
        if self.served is not None:
            self.served.engine.close()

    @property
    def now(self) -> Served | None:
        """What answers new requests."""
        return self.served

    async def take(self, request: Request) -> Served:
        """The model that answers this request, to its end, whatever is loaded meanwhile.

        Raises NotReadyError (503) where none is. `Door` lets it go.
        """
        await self._is_open.wait()
        if self.served is None:
            raise NotReadyError("no model is loaded; POST /load_model?model_path=… loads one")
        if getattr(request.state, "served", None) is None:
            self.served.take()
            request.state.served = self.served
            request.state.taken = time.monotonic()
        served: Served = request.state.served
        return served

    async def load(self, wanted: "Wanted") -> Served:
        """Serve this instead; requests under way end with what they began with.

        Beside the old model where memory allows, else after the last request of the old one, and
        new ones wait. Raises what the loader does, and then the old one serves on.
        """
        if self.fellows is not None:
            return await self.fellows.load(wanted)
        async with self._swap:
            if self.served is None or await asyncio.to_thread(self.loader.fits, wanted):
                return self.put(await self.prepare(wanted))
            return await self._load_instead(self.served, wanted)

    async def prepare(self, wanted: "Wanted") -> Served:
        """Loaded, and not served yet."""
        return await asyncio.to_thread(self.loader, wanted)

    def put(self, fresh: Served) -> Served:
        """From here on it answers."""
        fresh.start()
        old, self.served = self.served, fresh
        if old is not None:
            self._later(_end(old))
        log.info("serving %s from %s", fresh.model_name, fresh.wanted.path)
        return fresh

    async def _load_instead(self, old: Served, wanted: "Wanted") -> Served:
        self._is_open.clear()
        try:
            again = old.wanted
            self.served = None
            await _end(old)
            del old
            _give_back()
            try:
                return self.put(await self.prepare(wanted))
            except BaseException:
                self.put(await self.prepare(again))
                raise
        finally:
            self._is_open.set()

    def _later(self, ending: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(ending)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _end(old: Served) -> None:
    await old.end()
    log.info("%s is no longer in memory", old.model_name)
    del old
    _give_back()


def _give_back() -> None:
    """What was freed, to the system and to other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

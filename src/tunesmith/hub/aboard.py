"""Which adapters the engines have in memory, and how one gets there."""

import asyncio
from collections.abc import Callable

import httpx2

from tunesmith.errors import NotReadyError
from tunesmith.hub.answers import Target, bearer, message
from tunesmith.hub.names import FoundModel


class Unservable(NotReadyError):
    """An engine was asked to load it, and could not."""

    retry_after = 5


class Aboard:
    """Call from the server's event loop."""

    def __init__(self, http: Callable[[], httpx2.AsyncClient]) -> None:
        self._http = http
        self._adapters: dict[str, set[str]] = {}
        self._loading: dict[tuple[str, str], asyncio.Lock] = {}

    async def served_name(self, target: Target, found: FoundModel) -> str:
        """The base's own name, or the adapter's, loaded first where the engine has not got it.

        Raises Unservable, httpx2.TransportError.
        """
        if not found.folder.is_adapter:
            return target.base_name or found.folder.base.name
        name = found.adapter_key
        async with self._loading.setdefault((target.engine_id, name), asyncio.Lock()):
            if name not in self._adapters.get(target.engine_id, set()):
                reply = await self._http().post(
                    target.url + "/v1/load_lora_adapter",
                    json={"lora_name": name, "lora_path": str(found.folder.path)},
                    headers=bearer(target.key),
                )
                if reply.status_code >= 400 and not _is_taken(reply):
                    raise Unservable(f"{found.name!r} could not be loaded: {message(reply)}")
                self._adapters.setdefault(target.engine_id, set()).add(name)
        return name

    def forget(self, engine_id: str, name: str) -> bool:
        """Whether it was thought to be there, of an engine that does not know it (any more)."""
        known = self._adapters.get(engine_id, set())
        is_known = name in known
        known.discard(name)
        return is_known

    def lost(self, engine_id: str) -> None:
        """The engine has ended."""
        self._adapters.pop(engine_id, None)

    def forget_all_but(self, living: set[str]) -> None:
        """Of engines that are no more."""
        for gone in self._adapters.keys() - living:
            del self._adapters[gone]
        for key, lock in list(self._loading.items()):
            if key[0] not in living and not lock.locked():
                del self._loading[key]


def _is_taken(reply: httpx2.Response) -> bool:
    """Whether the engine has that adapter: from before a restart of ours. vLLM says it in words."""
    return reply.status_code == 409 or "taken" in reply.text or "already been loaded" in reply.text

"""An OpenAI-compatible server that the operator named: asked for the models that it lists."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx2

from tunesmith.errors import NotReadyError
from tunesmith.hub.answers import Target, bearer
from tunesmith.hub.names import FoundModel
from tunesmith.settings import Settings

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
"""What it lists is good for so long."""
_MAX_MODELS = 10_000


class Foreign:
    """Call from the server's event loop."""

    def __init__(self, settings: Settings, http: Callable[[], httpx2.AsyncClient]) -> None:
        self._url = settings.engine_url.rstrip("/").removesuffix("/v1")
        self._key = settings.engine_api_key.get_secret_value()
        self._http = http
        self._roots: Mapping[str, str] = {}
        self._looked = -LOOK_SECONDS
        self.is_well = False

    @property
    def names(self) -> list[str]:
        """As it listed them last."""
        return list(self._roots)

    async def named(self, model: str) -> Target | None:
        """Where a model of its own answers. Raises NotReadyError (503) while it is away."""
        return self._target(model) if model in await self._listed() else None

    async def holding(self, found: FoundModel) -> Target | None:
        """Where the base of a model of ours answers: by the folder that it was started with."""
        if not self._url:
            return None
        for name, root in (await self._listed()).items():
            if Path(root) == found.folder.base:
                return self._target(name)
        return None

    async def look(self) -> None:
        """Whether it is there; told to whoever asks for the health."""
        if self._url:
            try:
                await self._listed()
            except NotReadyError as error:
                log.warning("%s", error)

    def _target(self, name: str) -> Target:
        return Target("foreign", self._url, self._key, base_name=name, is_ours=False)

    async def _listed(self) -> Mapping[str, str]:
        """Name → root."""
        if not self._url or time.monotonic() - self._looked < LOOK_SECONDS:
            return self._roots
        url = f"{self._url}/v1/models"
        try:
            reply = await self._http().get(url, headers=bearer(self._key), timeout=10)
            reply.raise_for_status()
            listed = reply.json()["data"][:_MAX_MODELS]
            self._roots = {str(one["id"]): str(one.get("root") or one["id"]) for one in listed}
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            self.is_well = False
            away = NotReadyError(f"the engine at {self._url} does not answer: {error}")
            away.retry_after = 5
            raise away from None
        self._looked, self.is_well = time.monotonic(), True
        return self._roots

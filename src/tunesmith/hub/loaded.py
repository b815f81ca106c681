"""The model that is meant where a request names none, and what is told of it."""

from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.errors import BadRequestError, NotReadyError
from tunesmith.hub.aboard import Unservable
from tunesmith.hub.principal import Principal
from tunesmith.store import defaults
from tunesmith.store.defaults import Default

if TYPE_CHECKING:
    from tunesmith.hub import Hub

_OPERATOR = "operator"
_UNKNOWN = ("dtype", "parameters", "context_length", "quantization", "device")


class Loaded:
    """Each owner has a model of their own; who chose none has the operator's, or the setting's."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub

    def of(self, who: Principal) -> Default:
        """Raises NotReadyError (503) where none was loaded."""
        for owner in (who.owner, _OPERATOR):
            found = self._hub.store.read(partial(defaults.find, owner=owner))
            if found is not None:
                return found
        settings = self._hub.settings
        if not settings.model_path:
            raise NotReadyError("no model is loaded; POST /load_model?model_path=… loads one")
        return Default(settings.model_path, settings.precision)

    async def load(self, model: str, precision: str, who: Principal) -> None:
        """Make it the default once it serves. Raises NotFoundError, BadRequestError with why it
        cannot be served, NotReadyError; the one before is the default then as ever."""
        try:
            await self._hub.engines.place(model, who, precision, "model_path")
        except Unservable as error:
            raise BadRequestError(error.message, param="model_path") from None
        chosen = Default(model, precision)
        await self._hub.write(lambda tx: defaults.put(tx, who.owner, chosen))

    async def describe(self, who: Principal) -> dict[str, Any]:
        """`GET /model_info`. Raises NotReadyError where none is loaded or its engine is away."""
        default = self.of(who)
        target, _ = await self._hub.engines.place(default.model, who, default.precision)
        told = await self._hub.engines.describe(target) or dict.fromkeys(_UNKNOWN)
        none = {"gpu_memory_allocated": "0.00 GB", "gpu_memory_reserved": "0.00 GB", "adapters": []}
        shown = {"model_name": short(default.model), "model_path": default.model}
        return none | told | shown


def short(model: str) -> str:
    """A model's name as answers show it: the last part of its path."""
    return model.rstrip("/").rpartition("/")[2] or model

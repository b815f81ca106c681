"""The names that an engine answers to, and the tokenizer and template behind each."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.data.render import Renderer
from tunesmith.errors import NotFoundError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.model import base_of


@dataclass(frozen=True)
class Voice:
    """A served name: how it reads and writes, and the weights it runs with."""

    name: str
    folder: Path
    renderer: Renderer
    adapter: str | None = None
    """The adapter's name where it is one; None is the bare base."""
    parent: str | None = None
    """The served name of an adapter's base."""
    longest_token: int = 1
    """Characters."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path,
        renderer: Renderer,
        adapter: str | None = None,
        parent: str | None = None,
    ) -> "Voice":
        longest = max(map(len, renderer.tokenizer.get_vocab()), default=1)
        return cls(name, folder, renderer, adapter, parent, longest)

    def wire(self, context_length: int) -> dict[str, object]:
        """As `GET /v1/models` shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tunesmith",
            "root": str(self.folder),
            "parent": self.parent,
            "max_model_len": context_length,
        }


class Voices:
    """Every served name, the base's first. Only the event loop changes it."""

    def __init__(self, base: Voice) -> None:
        self._by_name = {base.name: base}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def all(self) -> list[Voice]:
        return list(self._by_name.values())

    def add(self, voice: Voice) -> None:
        self._by_name[voice.name] = voice

    def remove(self, name: str) -> None:
        self._by_name.pop(name, None)

    def get(self, name: str) -> Voice:
        """Raises NotFoundError."""
        if name not in self._by_name:
            raise NotFoundError(
                f"no model {name!r} is served; GET /v1/models lists them",
                error_code="model_not_found",
                param="model",
            )
        return self._by_name[name]


def renderer_of(folder: Path, fallback: Renderer | None = None) -> Renderer:
    """A folder's own tokenizer and template; an adapter without them speaks as its base does.

    Raises the renderer's error where the folder has no tokenizer that can be read.
    """
    if fallback is not None and not (folder / "tokenizer.json").is_file():
        return fallback
    if is_adapter(folder) and not (folder / "tokenizer.json").is_file():
        folder = base_of(folder)
    renderer = Renderer.load(folder)
    return renderer if renderer.template else renderer.with_fallback("openai")

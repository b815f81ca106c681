"""LoRA adapters over one copy of the base, loaded and dropped by name while it serves."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open

from tunesmith.errors import BadRequestError, NotFoundError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 1024
_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


class Adapters:
    """The adapters of one base. PEFT puts them inside the base's own layers.

    A name from outside stands for a key of ours: PEFT's names may hold no dots, and an adapter
    that was dropped stays under its key until the last sequence that uses it has ended, while
    another may already have its name.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._peft: Any = None
        self._keys: dict[str, str] = {}
        self._retired: set[str] = set()
        self._fresh_key = (f"adapter{n}" for n in itertools.count())
        self._active: str | None = None

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter and keep it under `name`; the base and the others are left alone.

        Raises BadRequestError where the folder is no LoRA adapter for this base.
        """
        if name in self._keys:
            raise BadRequestError(f"an adapter named {name!r} is loaded already", param="lora_name")
        check(self._base, folder)
        key = next(self._fresh_key)
        try:
            self._read(folder, key)
        except Exception as error:
            self._discard(key)
            raise BadRequestError(
                f"{folder.name}: cannot be loaded: {str(error)[:1000]}"
            ) from error
        self._keys[name] = key

    def key(self, name: str) -> str:
        """What a sequence remembers of its adapter. Raises NotFoundError."""
        if name not in self._keys:
            raise NotFoundError(f"no adapter named {name!r} is loaded", param="lora_name")
        return self._keys[name]

    def retire(self, name: str) -> None:
        """Take the name away; `sweep` takes the weights. Raises NotFoundError."""
        self._retired.add(self.key(name))
        del self._keys[name]

    def sweep(self, in_use: set[str | None]) -> None:
        """Drop the retired adapters whose keys are not `in_use`."""
        for key in self._retired - in_use:
            self._discard(key)
            self._retired.discard(key)

    @contextmanager
    def using(self, key: str | None) -> Iterator[None]:
        """Within this, the base runs with that adapter, or with none."""
        if self._peft is None:
            yield
        elif key is None:
            with self._peft.disable_adapter():
                yield
        else:
            if self._active != key:
                self._peft.set_adapter(key, inference_mode=True)
                self._active = key
            yield

    def _read(self, folder: Path, key: str) -> None:
        device = str(self._base.device)
        with torch.inference_mode(False):
            if self._peft is None:
                config = LoraConfig.from_pretrained(folder)
                config.inference_mode = True
                self._peft = PeftModel(self._base, config, adapter_name=key)
            self._active = None
            self._peft.load_adapter(folder, adapter_name=key, torch_device=device)
            self._peft.eval()
            self._peft.requires_grad_(False)

    def _discard(self, key: str) -> None:
        """Take an adapter out of the base again; the last one leaves a bare base."""
        self._active = None
        if self._peft is None:
            return
        others = [each for each in self._peft.peft_config if each != key]
        if others:
            self._peft.set_adapter(others[0], inference_mode=True)
            if key in self._peft.peft_config:
                self._peft.delete_adapter(key)
        else:
            self._peft.base_model.unload()
            self._peft = None


def check(base: Any, folder: Path) -> None:
    """Raise BadRequestError unless `folder` holds a LoRA adapter whose matrices fit `base`."""
    config = _config(folder)
    if config.get("peft_type") != "LORA":
        raise BadRequestError(f"{folder.name}: only LoRA adapters are served")
    if not (folder / WEIGHTS).is_file():
        raise BadRequestError(f"{folder.name}: no {WEIGHTS}; other formats are not read")
    modules = {name.replace(".base_layer", ""): each for name, each in base.named_modules()}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadRequestError(f"{folder.name}: {WEIGHTS} cannot be read: {error}") from None
    if not shapes:
        raise BadRequestError(f"{folder.name}: {WEIGHTS} is empty")
    for key, size in shapes.items():
        path, _, part = key.removeprefix(_PREFIX).partition(".lora_")
        if part and _misfits(modules.get(path), part, size):
            raise BadRequestError(f"{folder.name}: {key} of shape {size} does not fit the base")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        raise BadRequestError(f"{folder}: no adapter folder (no readable {CONFIG})") from None
    if not isinstance(config, dict):
        raise BadRequestError(f"{folder.name}: {CONFIG} must hold a JSON object")
    return config


def _misfits(module: Any, part: str, size: tuple[int, ...]) -> bool:
    if module is None:
        return True
    weight = module.weight
    sizes = set(weight.shape)
    if part.startswith("A."):
        return len(size) != 2 or size[0] > MAX_RANK or size[1] not in sizes
    if part.startswith("B."):
        return len(size) != 2 or size[1] > MAX_RANK or size[0] not in sizes
    return False

"""LoRA adapters over one copy of the base, loaded and dropped by name while it serves."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from tunesmith.errors import BadRequestError, JobFailure, NotFoundError
from tunesmith.infer.overlay import Patch
from tunesmith.nn.adapters import plan_known, published_name
from tunesmith.nn.folder import ModelFolder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 1024
_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


class Wearer(Protocol):
    """What adapters are laid over."""

    def put_on(self, number: int, folder: Path) -> int:
        """Returns the bytes that it takes. Raises BadRequestError, and nothing is left of it."""

    def take_off(self, number: int) -> None: ...


@dataclass
class _Known:
    """A number of ours stands for a name from outside: an adapter that was dropped stays under its
    number until the last sequence that uses it has ended, while another may have its name."""

    number: int
    folder: Path
    bytes: int = 0
    """0 while it is not in memory."""
    turn: int = 0
    """When it was last asked for."""


class Adapters:
    """By name. Those used longest ago are put away where memory asks for room, and come back by
    themselves when they are asked for."""

    def __init__(self, wearer: Wearer, max_bytes: int = 0) -> None:
        """`max_bytes` 0 sets no limit."""
        self._wearer = wearer
        self._max_bytes = max_bytes
        self._known: dict[str, _Known] = {}
        self._retired: set[int] = set()
        self._held: set[int] = set()
        """Numbers that sequences under way have, or that were given out since."""
        self._numbers = itertools.count()
        self._turns = itertools.count(1)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self._known.values())

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter and keep it under `name`; the base and the others are left alone.

        Raises BadRequestError where the folder is no LoRA adapter for this base.
        """
        if name in self._known:
            raise BadRequestError(f"an adapter named {name!r} is loaded already", param="lora_name")
        known = _Known(next(self._numbers), folder)
        self._bring(known)
        self._known[name] = known

    def key(self, name: str) -> int:
        """What a sequence remembers of its adapter; it is in memory now. Raises NotFoundError."""
        if name not in self._known:
            raise NotFoundError(f"no adapter named {name!r} is loaded", param="lora_name")
        known = self._known[name]
        if not known.bytes:
            self._bring(known)
        known.turn = next(self._turns)
        self._held.add(known.number)
        return known.number

    def retire(self, name: str) -> None:
        """Take the name away; `sweep` takes the weights. Raises NotFoundError."""
        if name not in self._known:
            raise NotFoundError(f"no adapter named {name!r} is loaded", param="lora_name")
        known = self._known.pop(name)
        if known.bytes:
            self._retired.add(known.number)

    def sweep(self, in_use: set[int | None]) -> None:
        """Drop the retired adapters whose numbers are not `in_use`."""
        self._held = {number for number in in_use if number is not None}
        for number in self._retired - self._held:
            self._wearer.take_off(number)
            self._retired.discard(number)

    def _bring(self, known: _Known) -> None:
        known.bytes = max(1, self._wearer.put_on(known.number, known.folder))
        known.turn = next(self._turns)
        if not self._max_bytes:
            return
        resident = {each.number: each for each in (*self._known.values(), known) if each.bytes}
        total = sum(each.bytes for each in resident.values())
        for each in sorted(resident.values(), key=lambda one: one.turn):
            if total <= self._max_bytes:
                return
            if each is not known and each.number not in self._held:
                total -= each.bytes
                each.bytes = 0
                self._wearer.take_off(each.number)


def patches_of(folder: Path, base: Path, modules: list[str]) -> dict[str, Patch] | None:
    """An adapter's changes by the names of modules; None where it is one that only PEFT wears.

    Raises BadRequestError where it does not fit.
    """
    given = ModelFolder(str(folder), base, {}, str(base), folder, _config(folder))
    try:
        plan = plan_known(given, modules)
    except (JobFailure, KeyError, TypeError, ValueError) as error:
        raise BadRequestError(f"{folder.name}: {CONFIG} cannot be used: {error}") from None
    if plan is None:
        return None
    patches: dict[str, Patch] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = set(file.keys())

        def part(module: str, side: str) -> torch.Tensor | None:
            name = published_name(f"{module}.{side}")
            if name not in found:
                return None
            found.discard(name)
            tensor: torch.Tensor = file.get_tensor(name).float()
            return tensor

        for module in plan.modules:
            down_RH, up_NR = part(module, "lora_A.weight"), part(module, "lora_B.weight")
            if down_RH is None or up_NR is None:
                raise BadRequestError(f"{folder.name}: {WEIGHTS} lacks {module}")
            magnitude_N = part(module, "lora_magnitude_vector")
            up_RN = (up_NR * plan.shape.scale).t().contiguous()
            patches[module] = Patch(down_RH, up_RN, magnitude_N)
    return None if found else patches


def check(shapes_of: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise BadRequestError unless `folder` holds a LoRA adapter whose matrices fit the weights of
    these shapes, by the names of their modules."""
    config = _config(folder)
    if config.get("peft_type") != "LORA":
        raise BadRequestError(f"{folder.name}: only LoRA adapters are served")
    if not (folder / WEIGHTS).is_file():
        raise BadRequestError(f"{folder.name}: no {WEIGHTS}; other formats are not read")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadRequestError(f"{folder.name}: {WEIGHTS} cannot be read: {error}") from None
    if not shapes:
        raise BadRequestError(f"{folder.name}: {WEIGHTS} is empty")
    for key, size in shapes.items():
        path, _, part = key.removeprefix(_PREFIX).partition(".lora_")
        if part and _misfits(shapes_of.get(path), part, size):
            raise BadRequestError(f"{folder.name}: {key} of shape {size} does not fit the base")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        raise BadRequestError(f"{folder}: no adapter folder (no readable {CONFIG})") from None
    if not isinstance(config, dict):
        raise BadRequestError(f"{folder.name}: {CONFIG} must hold a JSON object")
    return config


def _misfits(weight: tuple[int, ...] | None, part: str, size: tuple[int, ...]) -> bool:
    if weight is None:
        return True
    sizes = set(weight)
    if part.startswith("A."):
        return len(size) != 2 or size[0] > MAX_RANK or size[1] not in sizes
    if part.startswith("B."):
        return len(size) != 2 or size[1] > MAX_RANK or size[0] not in sizes
    return False

"""From a folder to a model that answers: weights, tokenizer, adapters, cache, engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tunesmith.errors import BadRequestError, NoSpaceError, NotFoundError, TuningAPIError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.engine import Engine
from tunesmith.infer.house import Served
from tunesmith.infer.model import ServedModel, base_of, load
from tunesmith.infer.precision import Precision
from tunesmith.infer.runner import Runner
from tunesmith.infer.scheduler import Limits
from tunesmith.infer.voices import Voice, Voices, renderer_of
from tunesmith.nn.memory import keep_freed_memory

_CACHE_SHARE = 4
"""A fourth of the memory that is free at the start is the default for the cache."""
_ADAPTER_SHARE = 4
"""And a fourth the most that adapters take."""
_GROWTH = 2
"""Bytes in memory for each byte of the files: they may hold 16 bits where we compute in 32."""


@dataclass(frozen=True)
class Wanted:
    """What is to be served."""

    path: Path
    name: str
    precision: Precision = "auto"
    adapters: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Loader:
    """What the process was told of memory, threads and places, for each model that it loads."""

    device: str = "cpu"
    threads: int = 1
    cache_bytes: int = 0
    """0: by the memory that is free."""
    adapter_bytes: int = 0
    """Of adapters in memory at once; 0: by the memory that is free."""
    reserve_bytes: int = 256 << 20
    """Left free where a model is loaded beside another."""
    running: int = Limits.running
    waiting: int = Limits.waiting

    def __call__(self, wanted: Wanted) -> Served:
        """Raises a TuningAPIError that says what is wrong: 404, 400, or 507 where memory ends."""
        _refuse_absent(wanted)
        try:
            return self._load(wanted)
        except (TuningAPIError, MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                if isinstance(error, TuningAPIError):
                    raise
                raise BadRequestError(f"{wanted.name}: cannot be loaded: {error}") from error
            raise NoSpaceError(
                f"{wanted.name}: the memory ended while it was loaded; a smaller model, 8-bit or "
                f"4-bit weights, or more memory would do ({str(error)[:300]})"
            ) from error

    def fits(self, wanted: Wanted) -> bool:
        """Whether it can be loaded beside what is loaded now. Raises as a load where it is none."""
        _refuse_absent(wanted)
        folder = base_of(wanted.path) if is_adapter(wanted.path) else wanted.path
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return weights * _GROWTH + self.reserve_bytes < _free_bytes(self.device)

    def _load(self, wanted: Wanted) -> Served:
        keep_freed_memory()
        model = load(wanted.path, wanted.name, self.device, wanted.precision, self._adapter_bytes)
        is_tuned = is_adapter(wanted.path)
        folder = base_of(wanted.path) if is_tuned else wanted.path
        renderer = renderer_of(wanted.path)
        base = Voice.of(
            name=_base_name(wanted, folder) if is_tuned else wanted.name,
            folder=folder,
            renderer=renderer_of(folder, renderer),
        )
        voices = Voices(base)
        if is_tuned:
            voices.add(Voice.of(wanted.name, wanted.path, renderer, wanted.name, base.name))
        for name, place in wanted.adapters.items():
            if name in voices:
                raise BadRequestError(f"two models are named {name!r}")
            model.adapters.load(name, place)
            voices.add(Voice.of(name, place, renderer_of(place, base.renderer), name, base.name))
        limits = self.size_cache(model)
        engine = Engine(Runner(model), limits, self.threads)
        return Served(engine, base, voices, wanted)

    def size_cache(self, model: ServedModel) -> Limits:
        """As many blocks as the budget holds, and no more than all places could ever fill."""
        shape, block = model.shape, Limits.block_tokens
        budget = self.cache_bytes or _free_bytes(shape.device) // _CACHE_SHARE
        most = self.running * -(-shape.context_length // block)
        blocks = min(budget // (shape.cache_bytes_per_token * block), most)
        if blocks < 1:
            raise BadRequestError(
                f"a cache of {budget} bytes holds no {block} tokens of this model; "
                f"give --cache-bytes at least {shape.cache_bytes_per_token * block}"
            )
        return Limits(
            running=self.running,
            waiting=self.waiting,
            blocks=blocks,
            longest=shape.context_length,
            has_doubling_rooms=shape.has_doubling_rooms,
        )

    @property
    def _adapter_bytes(self) -> int:
        return self.adapter_bytes or _free_bytes(self.device) // _ADAPTER_SHARE


def _refuse_absent(wanted: Wanted) -> None:
    """Raises NotFoundError, BadRequestError: before another model makes room for it."""
    place = str(wanted.path)[:1000]
    if not wanted.path.exists():
        raise NotFoundError(f"no model at {place!r} (no config.json there)", param="model_path")
    if not is_adapter(wanted.path) and not (wanted.path / "config.json").is_file():
        raise BadRequestError(f"{place}: no model folder (no config.json in it)")


def is_out_of_memory(error: BaseException) -> bool:
    """torch tells it in words where the allocator of the CPU refuses."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(
        sign in words for sign in ("allocate memory", "out of memory", "not enough memory")
    )


def _base_name(wanted: Wanted, folder: Path) -> str:
    return folder.name if folder.name != wanted.name else f"{folder.name} (base)"


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30

"""What a model folder holds, read without torch: its kind, size, context, tokenizer."""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tunesmith.errors import BadRequestError

_MAX_CONFIG_BYTES = 4 << 20
_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_HEADER_BYTES = 16 << 20
_MAX_FILES = 4096
_MAX_SIZE = 1 << 24
"""Of a configuration's widths, layers, words."""
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin")
_CODE = "auto_map"
_META = "__metadata__"
_NO_LAYER = re.compile(r"embed|(^|\.)(wte|wpe|lm_head|score|classifier)$")
_READ = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    _INDEX,
)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight."""

    module: str
    rows: int
    columns: int

    @property
    def sides(self) -> int:
        """An adapter has so many numbers for each of its ranks."""
        return self.rows + self.columns


@dataclass(frozen=True)
class Tensors:
    """What a safetensors file says of itself."""

    parameters: int
    size_bytes: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    base: Path
    """The folder of the full weights: `path` itself, or what an adapter stands on."""
    is_adapter: bool
    config: dict[str, Any]
    """Of the base."""
    parameters: int
    """Of the base; 0 where it has no weights yet."""
    weight_bytes: int
    has_tokenizer: bool
    has_weights: bool
    matrices: tuple["Matrix", ...] = ()
    """Of the base, where a layer multiplies by them."""
    adapter_parameters: int = 0
    """0 where it is none."""
    is_scoring: bool = False
    """A reward model: it gives a number, and no tokens."""
    files: tuple[Path, ...] = ()
    """All that is read of it, of the adapter and of the base."""
    mark: str = ""
    """Another where the base's files were put in the place of others, or written to."""

    @property
    def context_length(self) -> int | None:
        return self.size(*_CONTEXT_KEYS) or None

    @property
    def architectures(self) -> list[object]:
        told = self.config.get("architectures")
        return told if isinstance(told, list) else []

    @property
    def tokenizer_place(self) -> Path:
        """An adapter may come without one: then its base's holds."""
        return self.path if (self.path / "tokenizer.json").is_file() else self.base

    def size(self, *names: str) -> int:
        """The first of these configuration numbers that is there; 0 else."""
        return next((self._sizes[name] for name in names if name in self._sizes), 0)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """But for what is no size: the file is whatever its author wrote."""
        text = self.config.get("text_config", self.config)
        told = text.items() if isinstance(text, dict) else ()
        return {name: size for name, size in told if type(size) is int and 0 < size <= _MAX_SIZE}


def read(path: Path, field: str = "model") -> ModelFolder:
    """Look at a model folder. Raises BadRequestError with what is missing, naming `field`."""
    adapter = path / "adapter_config.json"
    is_adapter = adapter.exists()
    base = _adapter_base(path, adapter, field) if is_adapter else path
    stamps = tuple(stamp_of(folder) for folder in dict.fromkeys((path, base)))
    return _read(path, base, is_adapter, field, stamps)


@lru_cache(maxsize=256)
def _read(
    path: Path, base: Path, is_adapter: bool, field: str, stamps: tuple[object, ...]
) -> ModelFolder:
    config, adapter_config = _json(base / "config.json", field), path / "adapter_config.json"
    for folder in dict.fromkeys((path, base)):
        _refuse_code(folder, field)
    weights = sorted(base.glob("*.safetensors"))
    if not weights and any(base.glob("*.bin")):
        raise BadRequestError(
            f"{field}: {base.name} has pickled weights only; convert them to safetensors first",
            param=field,
        )
    if len(weights) > _MAX_FILES:
        raise BadRequestError(f"{field}: {base.name} has over {_MAX_FILES} parts", param=field)
    _refuse_parts_elsewhere(base, field)
    parts = [_tensors(file, field) for file in weights]
    adapter = path / "adapter_model.safetensors"
    return ModelFolder(
        path=path,
        base=base,
        is_adapter=is_adapter,
        config=config,
        parameters=sum(part.parameters for part in parts),
        weight_bytes=sum(part.size_bytes for part in parts),
        has_tokenizer=any(_has_tokenizer(folder, field) for folder in (path, base)),
        has_weights=bool(weights),
        matrices=tuple(matrix for part in parts for matrix in part.matrices),
        adapter_parameters=(
            _tensors(adapter, field).parameters if is_adapter and adapter.exists() else 0
        ),
        is_scoring=_is_scoring(config, _json(adapter_config, field) if is_adapter else {}),
        files=_files(path) + (() if base == path else _files(base)),
        mark=_mark(stamps[-1]),
    )


def _mark(stamp: Any) -> str:
    """Without the time of the last link to a file."""
    told = [tuple(entry)[:-1] for entry in stamp]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _is_scoring(config: dict[str, Any], adapter: dict[str, Any]) -> bool:
    """Saved with a head that scores: all of it, or an adapter."""
    told = config.get("architectures")
    named = told if isinstance(told, list) else []
    is_full = any(str(one).endswith("ForSequenceClassification") for one in named)
    return is_full or adapter.get("task_type") == "SEQ_CLS"


def _files(folder: Path) -> tuple[Path, ...]:
    named = [folder / name for name in _READ if (folder / name).exists()]
    return (*named, *folder.glob("*.safetensors"))


def _refuse_code(folder: Path, field: str) -> None:
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        if (folder / name).exists() and _CODE in _json(folder / name, field):
            raise BadRequestError(
                f"{field}: {folder.name} wants to run code of its own ({_CODE} in {name}); only "
                "architectures of transformers itself are loaded",
                param=field,
            )


def _refuse_parts_elsewhere(base: Path, field: str) -> None:
    """An index names the files of this folder, and nothing else."""
    if not (base / _INDEX).exists():
        return
    places = _json(base / _INDEX, field, _MAX_HEADER_BYTES).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else {""}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadRequestError(
                f"{field}: {base.name}/{_INDEX} must map weights to .safetensors files beside it, "
                f"not to {name[:100]!r}",
                param=field,
            )


def _has_tokenizer(folder: Path, field: str) -> bool:
    place = folder / "tokenizer.json"
    if not place.exists():
        return False
    if not place.is_file() or place.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise BadRequestError(
            f"{field}: {folder.name}/tokenizer.json is no file, or over "
            f"{_MAX_TOKENIZER_BYTES >> 20} MB",
            param=field,
        )
    return True


def _adapter_base(path: Path, adapter: Path, field: str) -> Path:
    named = _json(adapter, field).get("base_model_name_or_path")
    if not isinstance(named, str) or not named.isprintable() or not 0 < len(named) <= 4096:
        raise BadRequestError(f"{field}: {path.name} does not name its base model", param=field)
    base = Path(named)
    if not base.is_absolute():
        base = path / base
    if not _is_file(base / "config.json") or base.resolve() == path.resolve():
        raise BadRequestError(
            f"{field}: the base model of the adapter {path.name} is not at {named!r} any more",
            param=field,
        )
    return base


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _json(path: Path, field: str, limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    try:
        found = path.stat()
        if found.st_size > limit or not stat.S_ISREG(found.st_mode):
            raise ValueError("too large, or no file")
        found = json.loads(path.read_text("utf-8"))
    except OSError:
        raise BadRequestError(
            f"{field}: {path.parent.name} has no {path.name}; a model folder holds config.json, "
            "safetensors and tokenizer.json",
            param=field,
        ) from None
    except (ValueError, RecursionError):
        raise BadRequestError(f"{field}: {path.name} cannot be read as JSON", param=field) from None
    if not isinstance(found, dict):
        raise BadRequestError(f"{field}: {path.name} must hold a JSON object", param=field)
    return found


def _tensors(path: Path, field: str) -> Tensors:
    """From a safetensors file's header alone."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, size):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop(_META, None)
        parameters = sum(_elements(entry, size) for entry in header.values())
        return Tensors(parameters, size, tuple(_matrices(header)))
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError):
        raise BadRequestError(
            f"{field}: {path.name} is not a safetensors file", param=field
        ) from None


def _elements(entry: dict[str, Any], size: int) -> int:
    """Numbers in one tensor. Raises ValueError where its shape or its place cannot be."""
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if len(shape) > 8 or not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise ValueError
    if not 0 <= start <= end <= size or math.prod(shape) > 8 * (end - start):
        raise ValueError
    return math.prod(shape)


def _matrices(header: dict[str, Any]) -> Iterator[Matrix]:
    """But for tables of embeddings and heads, which are no layers that adapters go to."""
    for name, entry in header.items():
        module = name.removesuffix(".weight")
        if len(entry["shape"]) == 2 and module != name and not _NO_LAYER.search(module):
            yield Matrix(module, *entry["shape"])


def stamp_of(folder: Path) -> tuple[object, ...]:
    """Changes with whatever is read of it."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(one.name for one in entries)
    except OSError:
        return ()
    read = [name for name in names if name in _READ or name.endswith(_WEIGHTS)]
    return tuple((name, *_marks(folder / name)) for name in read[: 2 * _MAX_FILES])


def _marks(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

"""Tensors of a model folder: safetensors only, in one file or in several with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.nn.folder import refuse

MAX_FILE_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`. Raises JobFailure(USER_ERROR) where a file is broken or missing."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_file(folder / Path(name).name)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise refuse(f"{path}: cannot be read as safetensors ({error})") from None


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """As transformers names its files: one, or numbered ones of at most 5 GB and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = MAX_FILE_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = MAX_FILE_BYTES
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], str(folder / "model.safetensors"), {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1))

"""What a model folder holds, checked before anything in it is used: no code, no pickle."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import FailureClass, JobFailure

MAX_CONFIG_BYTES = 16 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class ModelFolder:
    """A full model, or an adapter together with the model it was made on."""

    given: str
    """As the caller wrote it; an adapter's config repeats it."""
    base: Path
    config: dict[str, Any]
    """The base model's config.json."""
    base_given: str
    adapter: Path | None = None
    adapter_config: dict[str, Any] | None = None


def open_folder(given: str, *, needs_weights: bool = True) -> ModelFolder:
    """Read and check the configs. Raises JobFailure(USER_ERROR) with what is wrong and where."""
    folder = Path(given)
    if not folder.is_dir():
        raise refuse(f"{given}: no such folder", "give the path of a model's folder")
    if not (folder / "adapter_config.json").is_file():
        return _open_full(given, given, None, None, needs_weights)
    adapter_config = _read_json(folder / "adapter_config.json")
    _check_adapter(folder, adapter_config)
    base_given = adapter_config.get("base_model_name_or_path")
    if not isinstance(base_given, str) or not (Path(base_given) / "config.json").is_file():
        raise refuse(
            f"{given}: the model it was trained on, {base_given!r}, is not a folder here",
            "put the base model back, or correct base_model_name_or_path in adapter_config.json",
        )
    return _open_full(given, base_given, folder, adapter_config, needs_weights)


def refuse(message: str, hint: str | None = None) -> JobFailure:
    return JobFailure(FailureClass.USER_ERROR, message, hint)


def _open_full(
    given: str,
    base_given: str,
    adapter: Path | None,
    adapter_config: dict[str, Any] | None,
    needs_weights: bool,
) -> ModelFolder:
    base = Path(base_given)
    if not (base / "config.json").is_file():
        raise refuse(f"{base_given}: no config.json", "give the folder of a saved model")
    config = _read_json(base / "config.json")
    _check_code(base, config)
    if needs_weights and not any(base.glob("*.safetensors")):
        raise _no_weights(base, "model.safetensors")
    return ModelFolder(given, base, config, base_given, adapter, adapter_config)


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    _check_code(folder, config)
    if config.get("peft_type") != "LORA":
        raise refuse(
            f"{folder}: an adapter of type {config.get('peft_type')!r}",
            "only LoRA adapters can be trained further",
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise _no_weights(folder, "adapter_model.safetensors")


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    scripts = sorted(path.name for path in folder.glob("*.py"))
    if scripts or config.get("auto_map"):
        found = scripts[0] if scripts else "auto_map in its config"
        raise refuse(
            f"{folder}: the model brings code of its own ({found}), which is never run",
            "use a model whose architecture transformers has, and remove the code from the folder",
        )


def _no_weights(folder: Path, expected: str) -> JobFailure:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return refuse(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is opened",
            f"convert it to {expected} on a machine you trust, with safetensors",
        )
    return refuse(
        f"{folder}: no weights; {expected} is missing", "give the folder of a saved model"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise refuse(f"{path}: over {MAX_CONFIG_BYTES >> 20} MiB, not a model's config")
        read = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise refuse(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(read, dict):
        raise refuse(f"{path}: an object was expected, not {type(read).__name__}")
    return read


def listed(names: Iterable[str], most: int = 12) -> str:
    """For a message: the first few of many names."""
    known = sorted(set(names))
    return ", ".join(known[:most]) + (", …" if len(known) > most else "")

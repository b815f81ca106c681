"""A base model as it is served, read from a folder, and its adapters by name."""

import json
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from tunesmith.errors import BadRequestError
from tunesmith.infer.adapters import WEIGHTS, Adapters, check, is_adapter, patches_of
from tunesmith.infer.hosted import HostedNet, Kind, context_length
from tunesmith.infer.lean import LeanNet, open_lean
from tunesmith.infer.precision import Precision
from tunesmith.infer.scheduler import Chunk
from tunesmith.infer.sequence import Sequence
from tunesmith.nn.packed import best_precision, can_int8


class Net(Protocol):
    """Whatever computes: a forward pass of our own, or transformers'."""

    def rows(
        self, chunks: Many[Chunk], worn: Mapping[Sequence, int], kind: Kind
    ) -> tuple[list[Chunk], Tensor]: ...

    def adopt(self, sequence: Sequence, source: Sequence, tokens: int) -> None: ...

    def stop(self, sequence: Sequence) -> None: ...

    def free(self, sequence: Sequence) -> None: ...


@dataclass(frozen=True)
class Shape:
    """What does not change while a model is served."""

    path: Path
    device: str
    dtype: str
    """Of what is between the products."""
    precision: str
    """Of the weights: fp32, bf16, int8 or int4."""
    parameters: int
    context_length: int
    vocabulary: int
    cache_bytes_per_token: int
    has_doubling_rooms: bool = False
    """Whether a sequence's room in the cache is a power of two: see `infer.rooms`."""


class ServedModel:
    """One copy of a base model, and the adapters that are laid over it.

    An adapter that our own forward pass cannot wear, such as one that changes the embedding, runs
    in transformers, which is opened beside it when the first of them comes.
    """

    def __init__(
        self, path: Path, device: str = "cpu", precision: Precision = "auto", adapter_bytes: int = 0
    ) -> None:
        """Read a full model's folder. Raises BadRequestError with what is wrong with it."""
        self._config = _config(path)
        self._path, self._device = path, device
        self._asked, self._precision = precision, _resolved(precision, device)
        self._odd: set[int] = set()
        """Adapters that only PEFT wears."""
        self._lean = self._open_lean()
        self._hosted = None if self._lean else self._open_hosted()
        self.adapters = Adapters(self, adapter_bytes)
        text = self._config.get_text_config()
        self.shape = Shape(
            path=path,
            device=device,
            dtype="bfloat16" if device.startswith("cuda") else "float32",
            precision=self._first.precision,
            parameters=self._first.parameters,
            context_length=context_length(text),
            vocabulary=int(text.vocab_size),
            cache_bytes_per_token=self._first.bytes_per_token,
            has_doubling_rooms=self._lean is not None,
        )

    @property
    def _first(self) -> LeanNet | HostedNet:
        net = self._lean or self._hosted
        assert net is not None, "one of them is open"
        return net

    def net(self, sequence: Sequence) -> Net:
        """Where a sequence of this adapter runs."""
        if self._lean is None or sequence.adapter in self._odd:
            assert self._hosted is not None
            return self._hosted
        return self._lean

    @property
    def is_lean(self) -> bool:
        """Whether the base runs in a forward pass of our own."""
        return self._lean is not None

    @property
    def nets(self) -> list[Net]:
        return [net for net in (self._lean, self._hosted) if net is not None]

    def put_on(self, number: int, folder: Path) -> int:
        check(self._first.weight_shapes, folder)
        try:
            patches = patches_of(folder, self._path, self._lean.modules) if self._lean else None
            if self._lean is not None and patches is not None:
                self._lean.put_on(number, patches)
                return self._lean.adapter_bytes(patches)
            self._hosted = self._hosted or self._open_hosted()
            self._hosted.put_on(number, folder)
            self._odd.add(number)
            return (folder / WEIGHTS).stat().st_size
        except BadRequestError:
            self.take_off(number)
            raise
        except Exception as error:
            self.take_off(number)
            raise BadRequestError(
                f"{folder.name}: cannot be loaded: {str(error)[:1000]}"
            ) from error

    def take_off(self, number: int) -> None:
        for net in (self._lean, self._hosted):
            if net is not None:
                net.take_off(number)
        self._odd.discard(number)

    def _open_lean(self) -> LeanNet | None:
        precision = self._precision
        if self._device != "cpu" or precision == "int4" or precision == "auto":
            return None
        if precision == "int8" and not can_int8():
            return None
        length = context_length(self._config.get_text_config())
        try:
            return open_lean(self._path, self._config, precision, length)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BadRequestError(
                f"{self._path.name}: cannot be loaded: {str(error)[:1000]}"
            ) from error

    def _open_hosted(self) -> HostedNet:
        options = _options(self._path, self._precision, self._asked, self._device)
        return HostedNet(self._path, self._config, self._device, options)


def load(
    path: Path,
    name: str,
    device: str = "cpu",
    precision: Precision = "auto",
    adapter_bytes: int = 0,
) -> ServedModel:
    """Read a full model, or an adapter's base with the adapter over it under `name`.

    Raises BadRequestError where the folder, or its base, cannot be served.
    """
    if not is_adapter(path):
        return ServedModel(path, device, precision, adapter_bytes)
    model = ServedModel(base_of(path), device, precision, adapter_bytes)
    model.adapters.load(name, path)
    return model


def base_of(adapter: Path) -> Path:
    """The folder of the base model that an adapter names. Raises BadRequestError."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        named = config["base_model_name_or_path"]
        base = Path(named)
    except (OSError, ValueError, KeyError, TypeError):
        raise BadRequestError(
            f"{adapter.name}: adapter_config.json must be JSON with a base_model_name_or_path"
        ) from None
    base = base if base.is_absolute() else adapter / base
    if not (base / "config.json").is_file():
        raise BadRequestError(
            f"{adapter.name}: its base model {str(named)[:300]!r} is no model folder"
        )
    return base.resolve()


def _config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise BadRequestError(f"{path}: no model folder (no config.json in it)")
    if not any(path.glob("*.safetensors")):
        raise BadRequestError(f"{path.name}: no .safetensors file; other formats are not read")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BadRequestError(f"{path.name}: cannot be loaded: {str(error)[:1000]}") from error
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise BadRequestError(f"{path.name}: a reward model gives scores, it cannot answer")
    return config


def _resolved(precision: Precision, device: str) -> Precision:
    if precision != "auto":
        return precision
    return "bf16" if device.startswith("cuda") else best_precision()


def _options(path: Path, precision: Precision, asked: Precision, device: str) -> dict[str, Any]:
    """For transformers. On a CPU, whole numbers come from bitsandbytes, and only where asked for:
    they save memory and no time there. Raises BadRequestError where it is not installed."""
    is_gpu = device.startswith("cuda")
    half = torch.bfloat16 if is_gpu else torch.float32
    if asked not in ("int8", "int4"):
        return {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise BadRequestError(
            f"{path.name}: weights of {precision.removeprefix('int')} bits need the package "
            "bitsandbytes for this model on this device; pip install bitsandbytes, or serve it "
            "unquantized"
        ) from None
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half
        )
    return {"dtype": half, "quantization_config": quantized, "device_map": {"": device}}

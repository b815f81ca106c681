"""A decoder read from a folder, its adapters by name, and proof that the engine can run it.

T tokens of a row, B rows whose logits are wanted, V vocabulary entries.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.errors import BadRequestError
from tunesmith.infer.adapters import Adapters, is_adapter
from tunesmith.infer.attention import NAME, Cache, Span, Step, running

_COUPLED = {"dynamic", "longrope"}
"""Rotary scalings that look at the longest position of the whole row."""
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True)
class Shape:
    """What does not change while a model is served."""

    path: Path
    device: str
    dtype: str
    parameters: int
    context_length: int
    vocabulary: int
    cache_bytes_per_token: int


class ServedModel:
    """One copy of a base model, and the adapters that are laid over it one at a time."""

    def __init__(self, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Read a full model's folder. Raises BadRequestError with what is wrong with it."""
        self._net = _read(path, device, dtype)
        self.adapters = Adapters(self._net)
        text = self._net.config.get_text_config()
        self.is_position_coupled = _rope_type(text) in _COUPLED
        self.shape = Shape(
            path=path,
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            parameters=sum(each.numel() for each in self._net.parameters()),
            context_length=_context_length(text),
            vocabulary=int(text.vocab_size),
            cache_bytes_per_token=self._prove(path, min(8, _context_length(text))),
        )

    @contextmanager
    def using(self, key: str | None) -> Iterator[None]:
        """Within this the adapter of that key is on; None is the bare base."""
        with self.adapters.using(key):
            yield

    def logits(self, ids: Sequence[int], positions: Sequence[int], rows: Sequence[int]) -> Tensor:
        """One forward pass over a row of T tokens. Returns the (B, V) logits at `rows`."""
        device = self._net.device
        row_B = torch.tensor(rows, dtype=torch.long, device=device)
        out = self._net(
            input_ids=torch.tensor([ids], dtype=torch.long, device=device),
            position_ids=torch.tensor([positions], dtype=torch.long, device=device),
            use_cache=False,
            logits_to_keep=row_B,
        )
        logits_BV: Tensor = out.logits[0]
        return logits_BV.float()

    def hidden(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One forward pass over a row of T tokens. Returns their (T, D) last hidden states."""
        device = self._net.device
        out = self._net.base_model(
            input_ids=torch.tensor([ids], dtype=torch.long, device=device),
            position_ids=torch.tensor([positions], dtype=torch.long, device=device),
            use_cache=False,
        )
        hidden_TD: Tensor = out.last_hidden_state[0]
        return hidden_TD.float()

    @torch.inference_mode()
    def _prove(self, path: Path, length: int) -> int:
        """Compare a prompt read in two halves with one plain pass, and set the attention.

        So an architecture with a state that the cache does not hold is refused at load, not served
        wrong. Returns the cache's bytes for one token.
        """
        ids = [
            (7 * i + 1) % int(self._net.config.get_text_config().vocab_size) for i in range(length)
        ]
        plain_V = self._net(input_ids=torch.tensor([ids], device=self._net.device)).logits[0, -1]
        try:
            self._net.set_attn_implementation(NAME)
            cache, half = Cache(1), max(length // 2, 1)
            for start, end in [(0, half), (half, length)]:
                if start < end:
                    span = Span(cache, 0, end - start, start)
                    with running(Step([span])):
                        own_BV = self.logits(ids[start:end], range(start, end), [end - start - 1])
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
            raise BadRequestError(
                f"{path.name}: this architecture cannot be served: {error}"
            ) from error
        tolerance = 1e-3 if self._net.dtype == torch.float32 else 0.2
        if not torch.allclose(own_BV[0], plain_V.float(), atol=tolerance, rtol=tolerance):
            raise BadRequestError(
                f"{path.name}: {self._net.config.model_type} keeps a state that the engine cannot "
                "hold between steps; serve it through another engine"
            )
        return max(cache.bytes // length, 1)


def load(path: Path, name: str, device: str = "cpu") -> ServedModel:
    """Read a full model, or an adapter's base with the adapter over it under `name`.

    Raises BadRequestError where the folder, or its base, cannot be served.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if not is_adapter(path):
        return ServedModel(path, device, dtype)
    model = ServedModel(base_of(path), device, dtype)
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


def _read(path: Path, device: str, dtype: torch.dtype) -> Any:
    if not (path / "config.json").is_file():
        raise BadRequestError(f"{path}: no model folder (no config.json in it)")
    if not any(path.glob("*.safetensors")):
        raise BadRequestError(f"{path.name}: no .safetensors file; other formats are not read")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            raise BadRequestError(f"{path.name}: a reward model gives scores, it cannot answer")
        odd = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _KNOWN_LAYERS
        if odd:
            raise BadRequestError(f"{path.name}: layers of type {sorted(odd)} cannot be served")
        net: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except BadRequestError:
        raise
    except Exception as error:
        raise BadRequestError(f"{path.name}: cannot be loaded: {str(error)[:1000]}") from error
    return net.to(device).eval().requires_grad_(False)


def _context_length(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else 1 << 20


def _rope_type(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    return str(kind)

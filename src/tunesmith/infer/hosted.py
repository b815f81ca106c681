"""A decoder as transformers runs it, with our attention over a cache for each sequence.

T tokens of a row, R rows that are wanted, H hidden size, V vocabulary entries.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tunesmith.errors import BadRequestError
from tunesmith.infer.attention import NAME, Cache, Span, Step, running
from tunesmith.infer.scheduler import Chunk
from tunesmith.infer.sequence import Sequence

_COUPLED = {"dynamic", "longrope"}
"""Rotary scalings that look at the longest position of the whole row."""
_BLOCK = 64
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}
Kind = Literal["logits", "hidden"]


class HostedNet:
    """Runs the chunks of one adapter as one row, without padding. Positions restart in the row with
    each sequence, and attention stays inside a sequence's own cache."""

    def __init__(self, folder: Path, config: Any, device: str, options: Mapping[str, Any]) -> None:
        """`options` go to transformers. Raises BadRequestError."""
        self._net = _read(folder, config, device, options)
        self._caches: dict[Sequence, Cache] = {}
        self._peft: Any = None
        self._active: int | None = None
        text = config.get_text_config()
        self.is_position_coupled = _rope_type(text) in _COUPLED
        self.parameters = sum(each.numel() for each in self._net.parameters())
        self.precision = _shown(self._net)
        self.weight_shapes = {
            name: tuple(each.weight.shape)
            for name, each in self._net.named_modules()
            if isinstance(getattr(each, "weight", None), Tensor)
        }
        self.bytes_per_token = self._prove(folder, min(8, context_length(text)))

    def rows(
        self, chunks: Many[Chunk], worn: Mapping[Sequence, int], kind: Kind
    ) -> tuple[list[Chunk], Tensor]:
        """The chunks in the order of their rows, and the logits (R, V) or last hidden states (R, H)
        of those that they want."""
        groups: dict[object, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            adapter = worn.get(chunk.sequence)
            groups[chunk.sequence if self.is_position_coupled else adapter].append(chunk)
        parts = [self._rows(group, worn.get(group[0].sequence), kind) for group in groups.values()]
        return [chunk for group in groups.values() for chunk in group], torch.cat(parts)

    def _rows(self, chunks: list[Chunk], adapter: int | None, kind: Kind) -> Tensor:
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            wanted += [len(ids) + row - chunk.start for row in chunk.rows]
            cache = self._caches.setdefault(chunk.sequence, Cache(_BLOCK))
            start = len(ids)
            ids += chunk.sequence.tokens(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            spans.append(Span(cache, start, len(ids), chunk.start))
        with self._using(adapter), running(Step(spans)):
            return self._pass(ids, positions, wanted, kind)

    def _pass(
        self, ids: list[int], positions: Iterable[int], wanted: list[int], kind: Kind
    ) -> Tensor:
        device = self._net.device
        rows_R = torch.tensor(wanted, dtype=torch.long, device=device)
        given = {
            "input_ids": torch.tensor([ids], dtype=torch.long, device=device),
            "position_ids": torch.tensor([list(positions)], dtype=torch.long, device=device),
            "use_cache": False,
        }
        out: Tensor
        if kind == "hidden":
            out = self._net.base_model(**given).last_hidden_state[0][rows_R]
        else:
            out = self._net(**given, logits_to_keep=rows_R).logits[0]
        return out.float()

    def adopt(self, sequence: Sequence, source: Sequence, tokens: int) -> None:
        """Begin with the keys and values of another's first tokens."""
        self._caches[sequence] = self._caches[source].copy(tokens)

    def stop(self, sequence: Sequence) -> None:
        """What it has stays for others to begin with."""

    def free(self, sequence: Sequence) -> None:
        self._caches.pop(sequence, None)

    def put_on(self, adapter: int, folder: Path) -> None:
        """Raises whatever PEFT does where it does not fit."""
        name, device = _name(adapter), str(self._net.device)
        with torch.inference_mode(False):
            if self._peft is None:
                config = LoraConfig.from_pretrained(folder)
                config.inference_mode = True
                self._peft = PeftModel(self._net, config, adapter_name=name)
            self._active = None
            self._peft.load_adapter(folder, adapter_name=name, torch_device=device)
            self._peft.eval()
            self._peft.requires_grad_(False)

    def take_off(self, adapter: int) -> None:
        """The last one leaves a bare base."""
        self._active = None
        if self._peft is None:
            return
        name = _name(adapter)
        others = [each for each in self._peft.peft_config if each != name]
        if others:
            self._peft.set_adapter(others[0], inference_mode=True)
            if name in self._peft.peft_config:
                self._peft.delete_adapter(name)
        else:
            self._peft.base_model.unload()
            self._peft = None

    @contextmanager
    def _using(self, adapter: int | None) -> Iterator[None]:
        """Within this, the base runs with that adapter, or with none."""
        if self._peft is None:
            yield
        elif adapter is None:
            with self._peft.disable_adapter():
                yield
        else:
            if self._active != adapter:
                self._peft.set_adapter(_name(adapter), inference_mode=True)
                self._active = adapter
            yield

    @torch.inference_mode()
    def _prove(self, folder: Path, length: int) -> int:
        """Compare a prompt read in two halves with one plain pass, and set the attention.

        So an architecture with a state that the cache does not hold is refused at load, not served
        wrong. Returns the cache's bytes for one token.
        """
        vocabulary = int(self._net.config.get_text_config().vocab_size)
        ids = [(7 * i + 1) % vocabulary for i in range(length)]
        plain_V = self._net(input_ids=torch.tensor([ids], device=self._net.device)).logits[0, -1]
        try:
            self._net.set_attn_implementation(NAME)
            cache, half = Cache(1), max(length // 2, 1)
            for start, end in [(0, half), (half, length)]:
                if start < end:
                    span = Span(cache, 0, end - start, start)
                    last = [end - start - 1]
                    with running(Step([span])):
                        own_1V = self._pass(ids[start:end], range(start, end), last, "logits")
        except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
            raise BadRequestError(
                f"{folder.name}: this architecture cannot be served: {error}"
            ) from error
        is_exact = self._net.dtype == torch.float32 and not _is_quantized(self._net)
        tolerance = 1e-3 if is_exact else 0.2
        if not torch.allclose(own_1V[0], plain_V.float(), atol=tolerance, rtol=tolerance):
            raise BadRequestError(
                f"{folder.name}: {self._net.config.model_type} keeps a state that the engine "
                "cannot hold between steps; serve it through another engine"
            )
        return max(cache.bytes // length, 1)


def _name(adapter: int) -> str:
    """PEFT's names may hold no dots."""
    return f"adapter{adapter}"


def _shown(net: Any) -> str:
    if _is_quantized(net):
        return "int4" if net.hf_quantizer.quantization_config.load_in_4bit else "int8"
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(net.dtype, str(net.dtype))


def _is_quantized(net: Any) -> bool:
    return getattr(net, "hf_quantizer", None) is not None


def _read(folder: Path, config: Any, device: str, options: Mapping[str, Any]) -> Any:
    try:
        odd = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _KNOWN_LAYERS
        if odd:
            raise BadRequestError(f"{folder.name}: layers of type {sorted(odd)} cannot be served")
        net: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except BadRequestError:
        raise
    except Exception as error:
        raise BadRequestError(f"{folder.name}: cannot be loaded: {str(error)[:1000]}") from error
    if not _is_quantized(net):
        net = net.to(device)
    return net.eval().requires_grad_(False)


def context_length(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else 1 << 20


def _rope_type(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    return str(kind)

"""A model in one GGUF file, as llama.cpp reads it.

Source of the layout: llama.cpp, `convert_hf_to_gguf.py`, and the `gguf` library's tensor names.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from tunesmith.data.render import Renderer
from tunesmith.errors import BadRequestError
from tunesmith.infer.exports import vocabulary
from tunesmith.nn.weights import read_tensors

Kind = Literal["f32", "f16", "q8_0"]
_Q8 = gguf.GGMLQuantizationType.Q8_0
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
_BLOCK = 32
"""Numbers that share a scale in Q8_0: a row has to be a multiple of it."""


def write(model: Path, out: Path, kind: Kind, tell: Callable[[int, int], None]) -> None:
    """Of a full model's folder. `tell` hears how many tensors of how many are done.

    Raises BadRequestError where GGUF cannot hold it.
    """
    config: Any = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise BadRequestError(
            f"{model.name}: GGUF files are written of {known}, not of {config.model_type}; "
            "export it as safetensors"
        )
    architecture = _ARCHITECTURES[config.model_type]
    tensors = read_tensors(model)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_name(model.name)
        writer.add_file_type(_FILE_TYPES[kind])
        (_describe_gpt2 if config.model_type == "gpt2" else _describe_llama)(writer, config)
        vocabulary.write(writer, Renderer.load(model), int(config.vocab_size))
        names = gguf.get_tensor_name_map(architecture, int(config.num_hidden_layers))
        for name, factors in _rope_factors(config):
            writer.add_tensor(name, factors)
        for done, (name, tensor) in enumerate(_published(tensors, config), 1):
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise BadRequestError(f"{model.name}: GGUF has no place for {name}")
            _add(writer, found, tensor, kind)
            tell(done, len(tensors))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe_llama(writer: gguf.GGUFWriter, config: Any) -> None:
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    head = int(getattr(config, "head_dim", None) or width // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.hidden_act != "silu":
        raise BadRequestError(f"GGUF cannot hold an activation of {config.hidden_act}")
    _describe_rope(writer, _rope(config))


def _describe_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise BadRequestError(f"GGUF cannot hold an activation of {config.activation_function}")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _context(config: Any) -> int:
    """As far as every layer sees all: llama.cpp has no window for these architectures."""
    window = getattr(config, "sliding_window", None)
    has_window = getattr(config, "use_sliding_window", True) and isinstance(window, int)
    length = int(config.max_position_embeddings)
    return min(length, int(window)) if has_window and window else length


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _describe_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise BadRequestError(f"GGUF files are not written with RoPE scaled by {kind!r}")


def _rope_factors(config: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """By what each frequency of Llama 3 is divided: as `transformers` scales them."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    head = int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for at in range(0, head, 2):
        wave = 2 * math.pi * base ** (at / head)
        smooth = (context / wave - low) / (high - low)
        scale = 1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else None
        factors.append(scale or (1.0 if wave < context / high else factor))
    yield "rope_freqs.weight", np.array(factors, dtype=np.float32)


def _published(tensors: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    """As llama.cpp lays them out."""
    is_gpt2 = config.model_type == "gpt2"
    is_turned = config.model_type in ("llama", "mistral")
    for name, tensor in tensors.items():
        if is_gpt2 and name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (
            is_gpt2
            and ".weight" in name
            and any(one in name for one in ("c_attn", "c_proj", "c_fc"))
        ):
            tensor = tensor.T
        if is_turned and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = _turned(tensor, int(heads))
        yield name, tensor


def _turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a head's first and second half in turns: llama.cpp rotates neighbours."""
    rows = tensor.shape[0] // heads // 2
    split = tensor.reshape(heads, 2, rows, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: Kind) -> None:
    """Vectors, and tables of positions, stay in fp32, as llama.cpp wants them."""
    exact = tensor.to(torch.float32).contiguous().numpy()
    if exact.ndim < 2 or kind == "f32" or name.startswith("position_embd"):
        writer.add_tensor(name, exact)
    elif kind == "f16" or exact.shape[-1] % _BLOCK:
        writer.add_tensor(name, exact.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(exact, _Q8), raw_dtype=_Q8)

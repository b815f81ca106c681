"""Tiny random models of many architectures, and what plain transformers makes of a batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from tunesmith.nn.batch import FlatBatch, Sample, flatten

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 99,
    "n_positions": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}
LEAN: dict[str, Any] = {
    "llama": LlamaConfig(**SIZE),
    "llama, tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "llama, grouped queries": LlamaConfig(**SIZE, num_key_value_heads=2),
    "llama, biases": LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": LlamaConfig(**SIZE, rope_parameters=LLAMA3),
    "llama, yarn rope": LlamaConfig(**SIZE, rope_parameters=YARN),
    "llama, linear rope": LlamaConfig(**SIZE, rope_parameters=LINEAR),
    "mistral, window": MistralConfig(**SIZE, num_key_value_heads=1, sliding_window=30),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=2),
    "qwen2, window": Qwen2Config(
        **SIZE,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=32),
    "gpt2": GPT2Config(**GPT2, **STILL),
}
HOSTED: dict[str, Any] = {
    "gemma": GemmaConfig(**SIZE, num_key_value_heads=1, head_dim=16),
    "gemma2": Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=16, sliding_window=20),
    "phi": PhiConfig(**SIZE),
    "phi3": Phi3Config(**SIZE, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**SIZE),
    "cohere": CohereConfig(**SIZE, logit_scale=0.3),
    "bloom": BloomConfig(**BLOOM, hidden_dropout=0.0, attention_dropout=0.0),
}


def write_model(config: Any, folder: Path, seed: int = 0) -> str:
    """A random model; its norms and biases too are away from one and zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for one in model.parameters():
            if one.ndim == 1:
                one.add_(torch.randn_like(one) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


def samples(lengths: tuple[int, ...] = (5, 130, 9, 1, 170, 40)) -> list[Sample]:
    """The last two thirds are labels; the sample of nine has none."""
    dice = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(3, 99, (length,), generator=dice).tolist(),
            [place >= length // 3 and length != 9 for place in range(length)],
        )
        for length in lengths
    ]


@dataclass(frozen=True)
class Outcome:
    loss: float
    grads: dict[str, Tensor]


def plain_outcome(model: nn.Module, given: list[Sample]) -> Outcome:
    """transformers' own padded forward pass and loss, made a sum."""
    longest = max(len(ids) for ids, _ in given)
    ids_BL = torch.zeros(len(given), longest, dtype=torch.int64)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for row, (ids, is_label) in enumerate(given):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        mask_BL[row, : len(ids)] = 1
        for place in range(1, len(ids)):
            if is_label[place]:
                labels_BL[row, place] = ids[place]
    model.train()
    loss = model(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL, use_cache=False).loss
    loss = loss * flatten(given).labels
    loss.backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return Outcome(loss.item(), grads)


def our_outcome(model: Any, batch: FlatBatch) -> Outcome:
    """Gradients under the names of `weights`: put where the weights were, and read out."""
    loss = model.loss_sum(batch)
    loss.backward()
    with torch.no_grad():
        for one in model.trainable().values():
            one.copy_(torch.zeros_like(one) if one.grad is None else one.grad)
    return Outcome(loss.item(), {name: one.clone() for name, one in model.weights().items()})


def largest_difference(ours: Outcome, theirs: Outcome) -> float:
    """Of any tensor, relative to its length, or to the mean length where it is all but zero."""
    lengths = [float(grad.norm()) for grad in theirs.grads.values()]
    floor = 1e-2 * sum(lengths) / len(lengths)
    return max(
        float((ours.grads[name] - grad).norm()) / max(float(grad.norm()), floor)
        for name, grad in theirs.grads.items()
    )


def load(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

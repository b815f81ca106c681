"""What both sides of the training benchmark train on: the same models, samples and updates."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 4096
SAMPLES = 2000
SHORTEST, LONGEST = 20, 512
PAD, END = 0, 1
BATCH = 8
"""Samples in a step."""
PAIRS = 4
"""Pairs in a step."""
BETA = 0.1
ASKED, GENERATIONS = 4, 8
"""Prompts of a step of reinforcement, and completions of each."""
COMPLETION = 64
"""Tokens of a completion, at most: few end before, the models being random."""
BLOCK = 256
"""Tokens of a packed row to pretrain on."""
LEARNING_RATE = 2e-5
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS, HIDDEN, INNER, HEADS = 7, 320, 896, 5

Sample = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is part of the completion."""


def samples(seed: int = 0) -> list[Sample]:
    """Random ids, log-uniform in length, of which the prompt is 20 to 50 %."""
    dice = random.Random(seed)
    made = []
    for _ in range(SAMPLES):
        length = int(math.exp(dice.uniform(math.log(SHORTEST), math.log(LONGEST + 1))))
        prompt = max(2, int(length * dice.uniform(0.2, 0.5)))
        ids = [dice.randrange(2, VOCABULARY) for _ in range(length - 1)] + [END]
        made.append((ids, [place >= prompt for place in range(length)]))
    return made


@dataclass(frozen=True)
class PairSample:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def pair_samples(seed: int = 0) -> list[PairSample]:
    """The chosen one is a sample; the rejected answer is as long as another sample's, at most."""
    dice = random.Random(seed)
    made = []
    for ids, mask in samples(seed):
        start = mask.index(True)
        length = max(2, min(LONGEST - start, int((len(ids) - start) * dice.uniform(0.5, 1.5))))
        other = [dice.randrange(2, VOCABULARY) for _ in range(length - 1)] + [END]
        made.append(PairSample(ids[:start], ids[start:], other))
    return made


def blocks(count: int, seed: int = 0) -> list[list[int]]:
    """Packed rows of random ids, each learnt whole."""
    dice = random.Random(seed)
    return [[dice.randrange(2, VOCABULARY) for _ in range(BLOCK)] for _ in range(count)]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 20 to 128 tokens, log-uniform."""
    dice = random.Random(seed)
    lengths = [int(math.exp(dice.uniform(math.log(20), math.log(129)))) for _ in range(count)]
    return [[dice.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths]


def reward(ids: list[int]) -> float:
    """The share of even ids: cheap, and never the same for a whole group."""
    return sum(one % 2 == 0 for one in ids) / len(ids)


@dataclass(frozen=True)
class Work:
    """One measurement that a side is asked for."""

    variant: str
    model: str
    """A folder."""
    is_lora: bool
    steps: int
    warm_up: int
    """Steps before the clock starts."""
    threads: int


def useful_flops_per_token(lengths: list[int], *, is_lora: bool) -> float:
    """6 N (LoRA: 4 N) of the layers and the head, the input embedding left out, and attention.

    Causal attention of a token in a sample of n: 2 * hidden * n a layer forward, three times that
    in all; averaged over tokens, n becomes the sum of squares over the sum.
    """
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER) + HIDDEN * VOCABULARY
    context = sum(length**2 for length in lengths) / sum(lengths)
    return (4 if is_lora else 6) * weights + 3 * LAYERS * 2 * HIDDEN * context


def write_models(folder: Path) -> dict[str, str]:
    """A Llama and a Gemma of about ten million random parameters, and a tokenizer for the peers."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        GemmaConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    size = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": 2,
    }
    configs = {"llama": LlamaConfig(**size), "gemma": GemmaConfig(**size, head_dim=64)}
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        pad_token="w0",
        eos_token="w1",
    )
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}

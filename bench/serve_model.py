"""The model of `bench/serve.py`: a Llama of 110 M random parameters, adapters, and a GGUF of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from serve_work import VOCABULARY
from tunesmith.data import samples
from tunesmith.infer.exports import gguf_file

ADAPTERS = 16
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Made:
    model: Path
    gguf: Path
    adapters: tuple[Path, ...]
    tokenizer: Any


def make(folder: Path) -> Made:
    """Once in a folder; found again there."""
    model, gguf = folder / "model", folder / "model-q8_0.gguf"
    adapters = tuple(folder / f"adapter{number}" for number in range(ADAPTERS))
    if not (folder / "ready").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        net = LlamaForCausalLM(_config())
        net.save_pretrained(model)
        tokenizer().save_pretrained(model)
        gguf_file.write(model, gguf, "q8_0", lambda done, total: None)
        for number, place in enumerate(adapters):
            _adapter(net, model, number).save_pretrained(place)
            net = LlamaForCausalLM.from_pretrained(model)
        (folder / "ready").touch()
    return Made(model, gguf, adapters, PreTrainedTokenizerFast.from_pretrained(model))


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[AddedToken(each, special=True) for each in _SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(samples.documentation_text(2_000_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def _adapter(net: LlamaForCausalLM, base: Path, seed: int) -> Any:
    net.name_or_path = str(base)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(net, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, each in tuned.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.02)
    return tuned

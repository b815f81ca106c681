"""Models in other formats: merged, and as GGUF, read by llama.cpp itself."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from task_files import sentencepiece_model
from train_fixtures import make_model
from tunesmith.data import sentencepiece
from tunesmith.errors import BadRequestError
from tunesmith.infer.exports import gguf_file
from tunesmith.infer.exports.__main__ import export
from tunesmith.infer.exports.asking import asked
from tunesmith.infer.exports.checking import check_gguf
from tunesmith.nn.weights import read_tensors, write_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=ROPE, attention_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=128)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256),
    ),
}


def tell(*_: object) -> None:
    return


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer."""
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture
def made(words: Path, tmp_path: Path) -> Iterator[Any]:
    """A model of a shape, with weights that tell positions and heads apart."""

    def make(shape: str) -> Path:
        folder = tmp_path / shape
        shutil.copytree(words, folder)
        kind, config = SHAPES[shape]
        torch.manual_seed(3)
        model = kind(config)
        with torch.no_grad():
            for one in model.parameters():
                one.mul_(4 if one.ndim > 1 else 1)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("llama", "f32"),
        ("mistral", "f16"),
        ("qwen2", "q8_0"),
        ("qwen3", "f32"),
        ("gpt2", "f32"),
    ],
)
def test_llama_cpp_says_what_the_engine_says(
    made: Any, tmp_path: Path, shape: str, kind: gguf_file.Kind
) -> None:
    out = tmp_path / "out.gguf"
    verdict = export(made(shape), out, "gguf", kind, tell)
    assert verdict is not None
    assert verdict.has_passed
    assert verdict.worst < {"f32": 2e-3, "f16": 0.02, "q8_0": 0.2}[kind]
    types = {one.tensor_type.name for one in gguf.GGUFReader(out).tensors}
    assert types == {"F32"} | ({kind.upper()} - {"F32"})


def test_a_tokenizer_of_sentencepiece_has_the_same_ids_there(tmp_path: Path) -> None:
    folder = tmp_path / "pieces"
    folder.mkdir()
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = sentencepiece.read(sentencepiece_model(**plain))
    sentencepiece.convert(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(model.specials))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**SIZES | ends)).save_pretrained(folder)
    verdict = export(folder, tmp_path / "out.gguf", "gguf", "f16", tell)
    assert verdict is not None
    assert "ids of 16 texts" in verdict.message


def test_an_adapter_is_merged_and_says_the_same(made: Any, tmp_path: Path) -> None:
    base = made("llama")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False),
    )
    tuned.save_pretrained(str(tmp_path / "adapter"))
    verdict = export(tmp_path / "adapter", tmp_path / "merged", "safetensors", "f32", tell)
    assert verdict is not None
    assert (verdict.has_passed, verdict.format) == (True, "fp32")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 80, 200, 7]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)
    assert export(tmp_path / "adapter", tmp_path / "a.gguf", "gguf", "q8_0", tell) is not None
    with pytest.raises(BadRequestError, match="is there already"):
        export(base, tmp_path / "merged", "safetensors", "f32", tell)


def test_an_export_of_other_weights_is_not_kept(made: Any, tmp_path: Path) -> None:
    model = made("mistral")
    witnessed = asked(model)
    weights = read_tensors(model)
    name = "model.layers.0.self_attn.k_proj.weight"
    write_tensors(model, weights | {name: weights[name].flip(0)})
    gguf_file.write(model, tmp_path / "x.gguf", "f32", tell)
    verdict = check_gguf(tmp_path / "x.gguf", model, witnessed, "f32", 1)
    assert not verdict.has_passed
    assert "conversation" in verdict.message


def test_what_gguf_cannot_hold_is_refused_in_a_sentence(made: Any, tmp_path: Path) -> None:
    model = made("llama")
    told = json.loads((model / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (model / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(BadRequestError, match="cuts texts by WhitespaceSplit"):
        gguf_file.write(model, tmp_path / "x.gguf", "f32", tell)

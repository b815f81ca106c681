"""Every other architecture runs as transformers has it, and computes the same without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, MambaConfig

from nn_fixtures import (
    HOSTED,
    LEAN,
    largest_difference,
    load,
    our_outcome,
    plain_outcome,
    samples,
    write_model,
)
from tunesmith.nn.batch import flatten
from tunesmith.nn.folder import open_folder
from tunesmith.nn.hosted import Ways, find_ways
from tunesmith.nn.language import open_model
from tunesmith.nn.opening import Opening, open_hosted

SAMPLES = samples()
BATCH = flatten(SAMPLES)


@pytest.mark.parametrize("name", [*HOSTED, "gpt2", "qwen3", "mistral, window"])
def test_loss_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model((LEAN | HOSTED)[name], tmp_path)
    theirs = plain_outcome(load(folder), SAMPLES)
    ours = our_outcome(open_hosted(open_folder(folder), Opening(lora=None)), BATCH)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert largest_difference(ours, theirs) < 1e-5


MAMBA = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=99, state_size=4)
SINKS = GptOssConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=1,
    vocab_size=99,
    initializer_range=0.1,
)


@pytest.mark.parametrize(
    ("config", "is_flat", "has_plain_head"),
    [
        (HOSTED["gemma"], True, True),
        (HOSTED["phi"], True, True),
        (HOSTED["gpt-neox"], True, True),
        (HOSTED["gemma2"], True, False),
        (HOSTED["cohere"], True, False),
        (HOSTED["bloom"], False, True),
        (MAMBA, False, True),
        (SINKS, False, True),
    ],
)
def test_what_an_architecture_allows_is_found_by_trying(
    config: Any, is_flat: bool, has_plain_head: bool, tmp_path: Path
) -> None:
    ways = find_ways(load(write_model(config, tmp_path)))
    assert ways == Ways(is_flat, has_plain_head, ways.attention)


def test_a_saved_model_names_no_attention_of_ours(tmp_path: Path) -> None:
    folder = write_model(HOSTED["gemma"], tmp_path / "base")
    model = open_model(folder, lora=None)
    model.save(tmp_path / "saved")
    assert "tunesmith" not in (tmp_path / "saved" / "config.json").read_text()
    before, after = load(folder).state_dict(), load(tmp_path / "saved").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loading_weights_undoes_a_step(tmp_path: Path) -> None:
    model = open_model(write_model(HOSTED["gemma"], tmp_path), lora=None)
    kept = {name: one.clone() for name, one in model.weights().items()}
    loss = model.loss_sum(BATCH).item()
    our_outcome(model, BATCH)
    model.load_weights(kept)
    assert model.loss_sum(BATCH).item() == loss


def test_gradient_checkpointing_computes_the_same(tmp_path: Path) -> None:
    folder = write_model(HOSTED["gemma"], tmp_path)
    plain = our_outcome(open_model(folder, lora=None), BATCH)
    sparing = our_outcome(open_model(folder, lora=None, gradient_checkpointing=True), BATCH)
    assert sparing.loss == plain.loss
    assert largest_difference(sparing, plain) < 1e-6


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    folder = write_model(LEAN["llama"], tmp_path)
    exact = open_model(folder, lora=None).loss_sum(BATCH).item()
    halved = open_model(folder, lora=None, precision="bf16")
    assert not halved.is_lean
    assert halved.loss_sum(BATCH).item() == pytest.approx(exact, rel=2e-2)

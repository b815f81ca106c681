"""The lean forward pass is transformers' own, and its weights come and go unchanged."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from nn_fixtures import (
    GPT2,
    LEAN,
    largest_difference,
    load,
    our_outcome,
    plain_outcome,
    samples,
    write_model,
)
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import open_model
from tunesmith.spec.train import Lora

SAMPLES = samples()
BATCH = flatten(SAMPLES)


@pytest.mark.parametrize("name", LEAN)
def test_loss_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(LEAN[name], tmp_path)
    theirs = plain_outcome(load(folder), SAMPLES)
    model = open_model(folder, lora=None)
    ours = our_outcome(model, BATCH)
    assert model.is_lean
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["llama, grouped queries", "mistral, window", "gpt2"])
@pytest.mark.parametrize("is_onednn", [True, False])
def test_either_library_of_products_computes_the_same(
    name: str, is_onednn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.nn.matmul.prefers_onednn", lambda: is_onednn)
    folder = write_model(LEAN[name], tmp_path)
    theirs = plain_outcome(load(folder), SAMPLES)
    ours = our_outcome(open_model(folder, lora=None), BATCH)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["llama, grouped queries", "qwen3", "gpt2"])
def test_weights_are_the_files_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = write_model(LEAN[name], tmp_path / "base")
    model = open_model(folder, lora=None)
    model.save(tmp_path / "saved")
    before, after = load(folder).state_dict(), load(tmp_path / "saved").state_dict()
    weights = model.weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[one], after[one]) for one in before)
    assert all(torch.equal(before[one], weights[one]) for one in weights)


def test_loading_weights_undoes_a_step(tmp_path: Path) -> None:
    model = open_model(write_model(LEAN["gpt2"], tmp_path), lora=None)
    kept = {name: one.clone() for name, one in model.weights().items()}
    loss = model.loss_sum(BATCH).item()
    our_outcome(model, BATCH)
    assert model.loss_sum(BATCH).item() != loss
    model.load_weights(kept)
    assert model.loss_sum(BATCH).item() == loss


def test_twenty_steps_lose_what_a_padded_loop_loses(tmp_path: Path) -> None:
    folder = write_model(LEAN["llama, grouped queries"], tmp_path)
    model, plain = open_model(folder, lora=None), load(folder)
    ours = torch.optim.AdamW(model.trainable().values(), lr=1e-3, fused=True)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    given = samples((12, 30, 4, 21))
    batch = flatten(given)
    for _ in range(20):
        ours.zero_grad()
        theirs.zero_grad()
        loss = model.loss_sum(batch)
        loss.backward()
        expected = plain_outcome(plain, given).loss
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        ours.step()
        theirs.step()


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    folder = write_model(LEAN["llama"], tmp_path)
    plain = our_outcome(open_model(folder, lora=None), BATCH)
    sparing = our_outcome(open_model(folder, lora=None, gradient_checkpointing=True), BATCH)
    assert sparing.loss == plain.loss
    assert all(torch.equal(sparing.grads[name], grad) for name, grad in plain.grads.items())


def test_the_same_batch_twice_gives_the_same_bits(tmp_path: Path) -> None:
    folder = write_model(LEAN["qwen2"], tmp_path)
    first, second = (our_outcome(open_model(folder, lora=None), BATCH) for _ in range(2))
    assert first.loss == second.loss
    assert all(torch.equal(second.grads[name], grad) for name, grad in first.grads.items())


def test_a_compiled_model_computes_the_same(tmp_path: Path) -> None:
    folder = write_model(LEAN["llama, tied"], tmp_path)
    theirs = plain_outcome(load(folder), SAMPLES)
    ours = our_outcome(open_model(folder, lora=None, compile=True), BATCH)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert largest_difference(ours, theirs) < 1e-5


def test_a_segment_longer_than_kept_shares_computes_the_same(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 99}
    config = LlamaConfig(**small, num_attention_heads=2, max_position_embeddings=2048)
    folder = write_model(config, tmp_path)
    given = samples((1100, 30))
    theirs = plain_outcome(load(folder), given)
    ours = our_outcome(open_model(folder, lora=None), flatten(given))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert largest_difference(ours, theirs) < 1e-5


def test_a_batch_without_labels_loses_nothing(tmp_path: Path) -> None:
    model = open_model(write_model(LEAN["llama"], tmp_path), lora=None)
    loss = model.loss_sum(flatten([([5, 6, 7], [False] * 3)]))
    loss.backward()
    assert loss.item() == 0


def test_gpt2_drops_out_in_training_only(tmp_path: Path) -> None:
    model = open_model(write_model(GPT2Config(**GPT2), tmp_path), lora=None)
    assert model.loss_sum(BATCH).item() != model.loss_sum(BATCH).item()
    model.eval()
    assert model.loss_sum(BATCH).item() == model.loss_sum(BATCH).item()


def test_a_model_from_scratch_hangs_on_its_seed_alone(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    LEAN["llama"].save_pretrained(folder)
    before = torch.random.get_rng_state()
    one, same, other = (
        open_model(str(folder), lora=None, from_scratch=True, seed=seed).weights()
        for seed in (1, 1, 2)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_architectures_differ_in_context_and_vocabulary(tmp_path: Path) -> None:
    model = open_model(write_model(LEAN["llama, tied"], tmp_path), lora=Lora())
    assert (model.context_length, model.vocabulary_size) == (512, 99)
    adapters = sum(one.numel() for one in model.trainable().values())
    whole = sum(one.numel() for one in load(tmp_path).parameters())
    assert model.parameters_total == whole + adapters

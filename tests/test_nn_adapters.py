"""Our LoRA layers are PEFT's: the same numbers, the same names, the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

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
from tunesmith.errors import JobFailure
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel, open_model
from tunesmith.spec.train import Lora

SAMPLES = samples()
BATCH = flatten(SAMPLES)


def stir(model: LanguageModel) -> None:
    """Away from the start, where an adapter changes nothing."""
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in model.trainable().items():
            if "lora_B" in name:
                one.copy_(torch.randn(one.shape, generator=dice) * 0.05)


def peft_outcome(base: str, adapter: Path) -> Any:
    model = PeftModel.from_pretrained(load(base), adapter, is_trainable=True)
    outcome = plain_outcome(model, SAMPLES)
    grads = {name.replace(".default", ""): grad for name, grad in outcome.grads.items()}
    return type(outcome)(outcome.loss, grads)


@pytest.mark.parametrize("name", ["llama, grouped queries", "qwen2", "qwen3", "gpt2", "gemma"])
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_a_saved_adapter_is_the_same_in_peft(name: str, targets: str, tmp_path: Path) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    some = ("c_attn", "mlp.c_proj") if name == "gpt2" else ("q_proj", "v_proj", "1.mlp.down_proj")
    lora = Lora(rank=4, alpha=6, targets="all-linear" if targets == "all-linear" else some)
    model = open_model(base, lora=lora)
    stir(model)
    model.save(tmp_path / "adapter")
    theirs = peft_outcome(base, tmp_path / "adapter")
    ours = our_outcome(model, BATCH)
    assert model.is_lean == (name in LEAN)
    assert ours.grads.keys() == theirs.grads.keys()
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_saved_adapter_gives_peft_the_same_logits(name: str, tmp_path: Path) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    model = open_model(base, lora=Lora(rank=4))
    stir(model)
    model.save(tmp_path / "adapter")
    merged = open_model(str(tmp_path / "adapter"), lora=None)
    merged.save(tmp_path / "merged")
    ids = torch.tensor([SAMPLES[1][0]])
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        apart, together = adapted(ids).logits, load(tmp_path / "merged").eval()(ids).logits
    assert torch.allclose(apart, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_an_adapter_goes_on_from_where_it_was(name: str, tmp_path: Path) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    model = open_model(base, lora=Lora(rank=4, targets=("q_proj", "o_proj")))
    stir(model)
    model.save(tmp_path / "adapter")
    again = open_model(str(tmp_path / "adapter"), lora=Lora(rank=16))
    assert again.trainable().keys() == model.trainable().keys()
    kept = model.weights()
    assert all(torch.equal(one, kept[name]) for name, one in again.weights().items())
    again.save(tmp_path / "again")
    model_loss, again_loss = (one.loss_sum(BATCH).item() for one in (model, again))
    assert again_loss == model_loss
    assert open_model(str(tmp_path / "again"), lora=Lora()).loss_sum(BATCH).item() == model_loss


def test_an_adapter_that_only_peft_knows_is_trained_by_peft(tmp_path: Path) -> None:
    base = write_model(LEAN["llama"], tmp_path / "base")
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    model = open_model(str(tmp_path / "adapter"), lora=Lora())
    assert not model.is_lean
    assert any("magnitude" in name for name in model.trainable())


def test_a_new_adapter_changes_nothing_and_starts_as_its_seed_says(tmp_path: Path) -> None:
    base = write_model(LEAN["llama"], tmp_path)
    bare = open_model(base, lora=None)
    one, same, other = (open_model(base, lora=Lora(), seed=seed) for seed in (1, 1, 2))
    assert one.loss_sum(BATCH).item() == pytest.approx(bare.loss_sum(BATCH).item(), rel=1e-6)
    name = next(iter(one.trainable()))
    assert torch.equal(one.trainable()[name], same.trainable()[name])
    assert not torch.equal(one.trainable()[name], other.trainable()[name])


def test_adapter_dropout_is_there_in_training_only(tmp_path: Path) -> None:
    model = open_model(write_model(LEAN["llama"], tmp_path), lora=Lora(dropout=0.5))
    stir(model)
    assert model.loss_sum(BATCH).item() != model.loss_sum(BATCH).item()
    model.eval()
    steady = model.loss_sum(BATCH).item()
    assert model.loss_sum(BATCH).item() == steady
    model.train()
    model.loss_sum(BATCH).backward()
    assert all(one.grad is not None for one in model.trainable().values())


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_targets_that_name_nothing_are_refused_with_what_there_is(
    name: str, tmp_path: Path
) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path)
    with pytest.raises(JobFailure, match="c_attn") as caught:
        open_model(base, lora=Lora(targets=("c_attn",)))
    assert "q_proj" in caught.value.hint


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = write_model(LEAN["llama"], tmp_path / "base")
    open_model(base, lora=Lora(rank=4)).save(tmp_path / "adapter")
    write_model(LEAN["llama, grouped queries"], tmp_path / "base")
    with pytest.raises(JobFailure, match="k_proj"):
        open_model(str(tmp_path / "adapter"), lora=Lora())

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
            if "magnitude" in name:
                one.mul_(1 + 0.1 * torch.randn(one.shape, generator=dice))


def peft_outcome(base: str, adapter: Path) -> Any:
    model = PeftModel.from_pretrained(load(base), adapter, is_trainable=True)
    outcome = plain_outcome(model, SAMPLES)
    grads = {
        name.replace(".default", "").replace("vector.weight", "vector"): grad
        for name, grad in outcome.grads.items()
    }
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


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("llama, biases", {"use_dora": True, "targets": ("q_proj", "v_proj", "o_proj", "up_proj")}),
        ("qwen3", {"use_dora": True, "use_rslora": True}),
        ("gpt2", {"use_dora": True}),
        ("gemma", {"use_dora": True}),
        ("llama", {"use_rslora": True}),
        ("gemma", {"use_rslora": True}),
    ],
)
def test_a_variant_of_lora_is_the_same_in_peft(
    name: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    model = open_model(base, lora=Lora(rank=4, alpha=6, **variant))
    bare = open_model(base, lora=None).loss_sum(BATCH).item()
    assert model.is_lean == (name in LEAN)
    assert model.loss_sum(BATCH).item() == pytest.approx(bare, rel=1e-6)
    stir(model)
    model.save(tmp_path / "adapter")
    theirs = peft_outcome(base, tmp_path / "adapter")
    again = open_model(str(tmp_path / "adapter"), lora=Lora())
    assert again.is_lean == model.is_lean
    assert again.loss_sum(BATCH).item() == pytest.approx(theirs.loss, rel=1e-6)
    ours = our_outcome(model, BATCH)
    assert ours.grads.keys() == theirs.grads.keys()
    assert largest_difference(ours, theirs) < 1e-5


def test_dora_thins_what_peft_thins(tmp_path: Path) -> None:
    """The mean over many masks: the frozen product is left whole, the changes are thinned."""
    base = write_model(LEAN["llama"], tmp_path / "base")
    lora = Lora(rank=4, alpha=6, dropout=0.3, use_dora=True, targets=("down_proj",))
    model = open_model(base, lora=lora)
    stir(model)
    torch.manual_seed(5)
    losses = [model.loss_sum(BATCH).item() for _ in range(20)]
    model.save(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)
    theirs = [plain_outcome(peft, SAMPLES).loss for _ in range(20)]
    spread = torch.tensor(theirs).std().item() / 20**0.5
    assert abs(sum(losses) / 20 - sum(theirs) / 20) < 5 * spread
    model.eval()
    assert model.loss_sum(BATCH).item() == model.loss_sum(BATCH).item()


@pytest.mark.parametrize("variant", [{}, {"use_dora": True, "use_rslora": True}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_saved_adapter_gives_peft_the_same_logits(
    name: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    model = open_model(base, lora=Lora(rank=4, **variant))
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
    config = LoraConfig(
        r=4,
        rank_pattern={"q_proj": 2},
        target_modules=["q_proj", "k_proj"],
        task_type="CAUSAL_LM",
    )
    get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    model = open_model(str(tmp_path / "adapter"), lora=Lora())
    assert not model.is_lean
    assert {len(one) for name, one in model.trainable().items() if "lora_A" in name} == {2, 4}


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_an_adapter_learns_over_weights_of_few_bits(
    bits: Any, variant: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = write_model(LEAN["llama"], tmp_path / "base")
    lora = Lora(rank=4, **variant)
    model = open_model(base, lora=lora, precision="bf16", device="cuda:0", quantization=bits)
    batch = flatten(SAMPLES, "cuda:0")
    adam = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.loss_sum(batch)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    exact = open_model(base, lora=lora, precision="bf16", device="cuda:0").loss_sum(batch).item()
    assert losses[0] == pytest.approx(exact, rel=0.05)
    model.save(tmp_path / "adapter")
    again = open_model(str(tmp_path / "adapter"), lora=lora, precision="bf16", device="cuda:0")
    assert again.loss_sum(batch).item() < losses[0]

"""A model that two processes share out computes what it does in one, and is saved whole."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PhiConfig, PhiForCausalLM

from several import run_several
from train_fixtures import (
    Events,
    Place,
    make_model,
    pairs,
    preferences,
    run_here,
    sft,
    tuned,
    write_rows,
)
from tunesmith.spec.pipe import Inputs, Plan, TrainerTask
from tunesmith.spec.train import Best, Lora, Preference, Reward, Run, Sft

ALONE = Plan(threads=1, micro_batch_tokens=48)
SHARED = ALONE.model_copy(update={"processes": 2, "parallel": "fsdp"})
RUN = Run(save_steps=1, keep_checkpoints=20, save_seconds=3600, best=Best(min_delta=0.001))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("sharded")
    model = make_model(folder / "model")
    make_model(folder / "phi")
    config = PhiConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    torch.manual_seed(3)
    PhiForCausalLM(config).save_pretrained(folder / "phi")
    write_rows(folder / "pairs.jsonl", preferences(9))
    write_rows(folder / "held.jsonl", pairs(5))
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(13)))


def whole_model(batch_size: int) -> Sft:
    """Steps of six rows, and one of one: a process then has nothing to compute."""
    return sft(batch_size=batch_size, epochs=2, run=RUN, eval_dataset="e")


def with_held_out(place: Place) -> Inputs:
    held = str(place.folder / "held.jsonl")
    return Inputs(model=str(place.model), dataset=str(place.dataset), eval_dataset=held)


def preference(place: Place, batch_size: int, plan: Plan) -> TrainerTask:
    """On a model whose adapters are PEFT's in one process too."""
    inputs = Inputs(model=str(place.folder / "phi"), dataset=str(place.folder / "pairs.jsonl"))
    spec = tuned(Preference, batch_size=batch_size, lora=Lora(rank=4), epochs=2)
    return place.task(spec, plan=plan, inputs=inputs)


def reward(place: Place, batch_size: int, plan: Plan) -> TrainerTask:
    inputs = Inputs(model=str(place.model), dataset=str(place.folder / "pairs.jsonl"))
    return place.task(tuned(Reward, batch_size=batch_size), plan=plan, inputs=inputs)


@dataclass(frozen=True)
class Told:
    full: Events
    pairs: Events
    scores: Events


@pytest.fixture(scope="module")
def told(place: Place) -> Told:
    full = place.task(whole_model(3), plan=SHARED, inputs=with_held_out(place))
    tasks = [full, preference(place, 2, SHARED), reward(place, 2, SHARED)]
    return Told(*run_several([(task, [0, 0]) for task in tasks]))


def assert_alike(shared: Events, alone: Events) -> None:
    assert shared.of("started")[0]["plan"]["parallel"] == "fsdp"
    pairs_of_steps = list(zip(shared.of("step"), alone.of("step"), strict=True))
    assert pairs_of_steps
    for ours, theirs in pairs_of_steps:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, abs=1e-5)


def weights_of(events: Events) -> dict[str, torch.Tensor]:
    [path] = Path(events.last["artifact"]).glob("*.safetensors")
    return load_file(path)


def test_a_model_that_is_shared_out_trains_as_one_that_is_whole(place: Place, told: Told) -> None:
    alone = run_here(place.task(whole_model(6), plan=ALONE, inputs=with_held_out(place)))
    assert_alike(told.full, alone)
    for ours, theirs in zip(told.full.of("evaluated"), alone.of("evaluated"), strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
    weights, expected = weights_of(told.full), weights_of(alone)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)


def test_it_goes_on_from_a_checkpoint_to_the_same_bits(place: Place, told: Told) -> None:
    second = told.full.of("checkpointed")[1]["path"]
    inputs = with_held_out(place)
    task = place.task(whole_model(3), plan=None, resume_from=second, inputs=inputs)
    [rest] = run_several([(task, [0, 0])])
    losses = told.full.losses
    assert rest.losses == {step: losses[step] for step in (3, 4, 5, 6)}
    weights = weights_of(told.full)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(rest).items())


def test_adapters_over_a_shared_base_learn_from_pairs_alike(place: Place, told: Told) -> None:
    alone = run_here(preference(place, 4, ALONE))
    assert_alike(told.pairs, alone)
    weights = weights_of(told.pairs)
    for name, tensor in weights_of(alone).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_reward_model_that_is_shared_out_scores_alike(place: Place, told: Told) -> None:
    assert_alike(told.scores, run_here(reward(place, 4, ALONE)))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"parallel": "fsdp"}, "devices has to be 2"),
        ({"parallel": "fsdp", "devices": 2, "quantization": "4bit"}, "quantized"),
        ({"parallel": "fsdp", "devices": 2, "generated_rows": 2}, "generated_rows has to be 0"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(run: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Run.model_validate(run)

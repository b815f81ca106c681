"""Several adapters over one copy of the weights compute, each, what they would alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nn_fixtures import HOSTED, LEAN, samples, write_model
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel, open_beside, open_with
from tunesmith.nn.opening import Opening
from tunesmith.spec.train import Lora

BATCH = flatten(samples())
LORAS = (
    Lora(rank=2),
    Lora(rank=4, alpha=6, use_rslora=True),
    Lora(rank=2, use_dora=True),
    Lora(rank=2, dropout=0.3, targets=("o_proj", "down_proj")),
)


def learn(model: LanguageModel, seed: int) -> list[float]:
    """The losses of two steps, dropout drawn from the seed."""
    torch.manual_seed(seed)
    adam = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    return [step(model, adam) for _ in range(2)]


def step(model: LanguageModel, adam: torch.optim.AdamW) -> float:
    loss = model.loss_sum(BATCH) / BATCH.labels
    loss.backward()
    adam.step()
    adam.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", ["llama, tied", "qwen3", "gemma"])
def test_each_learns_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    openings = [Opening(lora=lora, seed=seed) for seed, lora in enumerate(LORAS, 5)]
    beside = open_beside(base, openings)
    adams = [torch.optim.AdamW(one.trainable().values(), lr=1e-2) for one in beside]
    states = [torch.Generator().manual_seed(opening.seed).get_state() for opening in openings]
    losses: list[list[float]] = [[] for _ in beside]
    for _ in range(2):
        for place, model in enumerate(beside):
            torch.set_rng_state(states[place])
            losses[place].append(step(model, adams[place]))
            states[place] = torch.get_rng_state()
    for place, opening in enumerate(openings):
        alone = open_with(base, opening)
        assert alone.is_lean == beside[place].is_lean == (name in LEAN)
        assert losses[place] == learn(alone, opening.seed)
        same = alone.weights()
        assert all(torch.equal(one, same[key]) for key, one in beside[place].weights().items())


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_each_is_saved_by_itself_and_read_back(name: str, tmp_path: Path) -> None:
    base = write_model((LEAN | HOSTED)[name], tmp_path / "base")
    openings = [Opening(lora=lora, seed=seed) for seed, lora in enumerate(LORAS)]
    beside = open_beside(base, openings)
    for place, (model, opening) in enumerate(zip(beside, openings, strict=True)):
        learn(model, opening.seed)
        model.save(tmp_path / f"adapter-{place}")
    for place, model in enumerate(beside):
        model.eval()
        again: Any = open_with(str(tmp_path / f"adapter-{place}"), Opening(lora=Lora()))
        again.eval()
        assert again.loss_sum(BATCH).item() == model.loss_sum(BATCH).item()
    known = open_beside(str(tmp_path / "adapter-1"), openings[:2])
    assert [one.weights().keys() for one in known] == [beside[1].weights().keys()] * 2

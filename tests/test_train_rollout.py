"""Completions drawn in the trainer are the model's, and their log-probabilities training's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from nn_fixtures import GPT2, HOSTED, LEAN, STILL, load, write_model
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel, open_model
from tunesmith.nn.sampling import uniforms
from tunesmith.spec.train import Lora
from tunesmith.train.rollout import Completion, Rollouts, Wish

MODELS = LEAN | HOSTED
KINDS = ["llama, grouped queries", "mistral, window", "qwen3", "gpt2", "gemma2", "bloom"]
DICE = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 99, (n,), generator=DICE).tolist() for n in (5, 40, 1, 23)]
WISH = Wish(max_new_tokens=12, stop_ids=frozenset({2, 50, 51}))


def opened(name: str, folder: Path, lora: Lora | None = None) -> LanguageModel:
    model = open_model(write_model(MODELS[name], folder), lora=lora)
    with torch.no_grad():
        for one in model.trainable().values():
            one.add_(0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(5)))
    return model


def trained_log_probs(model: LanguageModel, found: Completion) -> torch.Tensor:
    prompt = PROMPTS[found.prompt]
    mask = [False] * len(prompt) + [True] * len(found.ids)
    return model.log_probs(flatten([([*prompt, *found.ids], mask)]))


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
@pytest.mark.parametrize("name", KINDS)
def test_log_probabilities_are_those_of_the_training_forward(
    name: str, lora: Lora | None, tmp_path: Path
) -> None:
    model = opened(name, tmp_path, lora)
    found = Rollouts(model).sample(PROMPTS, WISH, n=3, seed=1)
    assert [one.prompt for one in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({one.ids for one in found}) > 8
    for one in found:
        theirs = trained_log_probs(model, one)
        assert torch.tensor(one.log_probs) == pytest.approx(theirs.detach(), abs=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_greedy_completions_are_those_of_generate(name: str, tmp_path: Path) -> None:
    model = open_model(write_model(MODELS[name], tmp_path), lora=None)
    found = Rollouts(model).sample(PROMPTS, replace(WISH, temperature=0))
    plain: Any = load(str(tmp_path)).eval()
    for prompt, one in zip(PROMPTS, found, strict=True):
        told = plain.generate(
            torch.tensor([prompt]),
            max_new_tokens=WISH.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(WISH.stop_ids),
            pad_token_id=0,
        )
        assert list(one.ids) == told[0, len(prompt) :].tolist()
        assert one.finish == ("stop" if one.ids[-1] in WISH.stop_ids else "length")


def test_a_completion_hangs_on_its_seed_and_place_not_on_its_company(tmp_path: Path) -> None:
    rollouts = Rollouts(opened("llama, grouped queries", tmp_path))
    together = rollouts.sample(PROMPTS, WISH, n=2, seed=1)
    again = rollouts.sample(PROMPTS, WISH, n=2, seed=1)
    assert together == again
    few = replace(rollouts, cache_tokens=60)
    alone = [
        one
        for at, prompt in enumerate(PROMPTS)
        for one in few.sample([prompt], WISH, n=2, seed=1, places=[at])
    ]
    assert [one.ids for one in few.sample(PROMPTS, WISH, n=2, seed=1)] == [one.ids for one in alone]
    assert [one.ids for one in alone] == [one.ids for one in together]
    other = rollouts.sample(PROMPTS, WISH, n=2, seed=2)
    assert [one.ids for one in other] != [one.ids for one in together]


def test_completions_end_with_the_context(tmp_path: Path) -> None:
    config = GPT2Config(**(GPT2 | STILL | {"n_positions": 44}))
    model = open_model(write_model(config, tmp_path), lora=None)
    wish = Wish(max_new_tokens=40, stop_ids=frozenset())
    found = Rollouts(model).sample(PROMPTS, wish)
    assert [len(one.ids) for one in found] == [39, 4, 40, 21]
    assert {one.finish for one in found} == {"length"}


@pytest.mark.parametrize("change", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_narrowest_sampling_is_greedy(change: dict[str, Any], tmp_path: Path) -> None:
    rollouts = Rollouts(opened("gpt2", tmp_path))
    greedy = rollouts.sample(PROMPTS, replace(WISH, temperature=0))
    narrow = rollouts.sample(PROMPTS, replace(WISH, **change), seed=4)
    assert [one.ids for one in narrow] == [one.ids for one in greedy]


def test_the_temperature_is_in_the_log_probabilities_and_entropies(tmp_path: Path) -> None:
    rollouts = Rollouts(opened("gpt2", tmp_path))
    wish = Wish(max_new_tokens=1, stop_ids=frozenset(), temperature=2.0)
    one = rollouts.sample(PROMPTS[:1], wish)[0]
    flat = flatten([([*PROMPTS[0], 3], [False] * 5 + [True])])
    log_probs_V = (rollouts.model.logits(flat)[0] / 2).log_softmax(-1)
    assert one.log_probs[0] == pytest.approx(log_probs_V[one.ids[0]].item(), abs=1e-5)
    entropy = -(log_probs_V.exp() * log_probs_V).sum().item()
    assert one.entropies[0] == pytest.approx(entropy, abs=1e-5)


def test_random_numbers_are_even_and_hang_on_their_place_alone() -> None:
    streams = torch.tensor([0, 1, 2**40])
    numbers = uniforms(7, streams, 0, 20_000)
    assert torch.equal(numbers[:, 5:9], uniforms(7, streams, 5, 4))
    assert not torch.equal(numbers, uniforms(8, streams, 0, 20_000))
    assert 0 <= numbers.min() < numbers.max() < 1
    shares = torch.stack([(numbers < edge).double().mean(1) for edge in (0.1, 0.5, 0.9)], 1)
    assert shares == pytest.approx(torch.tensor([[0.1, 0.5, 0.9]] * 3), abs=0.01)
    assert abs(torch.corrcoef(numbers)[0, 1]) < 0.02

"""A prompt that several answers share: the same as each answer after a prompt of its own."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nn_fixtures import HOSTED, LEAN, write_model
from tunesmith.nn.batch import flatten
from tunesmith.nn.cross_entropy import linear_log_probs
from tunesmith.nn.forks import Fork, flatten_ends, flatten_forks
from tunesmith.nn.language import open_model
from tunesmith.spec.train import Lora


def ids(start: int, count: int) -> list[int]:
    return [(start * 7 + 13 * place) % 96 + 3 for place in range(count)]


def fork(prompt: int, *answers: int) -> Fork:
    told = [ids(17 + prompt + count, count) for count in answers]
    return Fork(ids(prompt, prompt), tuple((one, [True] * len(one)) for one in told))


FORKS = [fork(5, 4, 9), fork(140, 30, 12), fork(1, 1, 3), fork(40, 2), fork(0, 6, 4)]


def test_a_prompt_stands_once_and_every_answer_goes_on_from_it() -> None:
    one = Fork([10, 11], (([12, 13], [True, False]), ([14, 15, 16], [True] * 3)))
    batch = flatten_forks([one], is_whole=True)
    assert batch.flat.ids_T.tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert batch.flat.positions_T.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.flat.bounds == (0, 4, 7)
    assert batch.flat.key_bounds == (0, 4, 9)
    assert batch.flat.runs == ((0, 4), (0, 2), (4, 7))
    assert batch.flat.rows_R.tolist() == [1, 1, 4, 5, 0, 2]
    assert batch.flat.targets_R.tolist() == [12, 14, 15, 16, 11, 13]
    assert batch.owners_A.tolist() == [0, 1, 1, 1]
    assert batch.sums(torch.tensor([1.0, 2, 3, 4, 50, 60])).tolist() == [1, 9]
    assert batch.rest(torch.tensor([1.0, 2, 3, 4, 50, 60])).tolist() == [50, 60]
    assert batch.counts().tolist() == [1, 3]


def test_answers_that_share_nothing_are_laid_out_apart() -> None:
    batch = flatten_forks([fork(0, 6, 4)])
    assert batch.flat.runs is None
    assert flatten_forks([fork(1000, 4, 30)]).flat.runs is None
    assert flatten_forks(FORKS, is_shared=False).flat.runs is None


MODELS = [*LEAN, "gemma", "gemma2", "phi3"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_answers_that_share_a_prompt_are_those_that_have_it_alone(
    name: str, lora: Lora | None, tmp_path: Path
) -> None:
    folder = write_model((LEAN | HOSTED)[name], tmp_path)
    model = open_model(folder, lora=lora)
    assert model.can_share_prompts
    for parameter in model.trainable().values() if lora else ():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for is_shared in (True, False):
        batch = flatten_forks(FORKS, is_shared=is_shared, is_whole=True)
        values_R = model.log_probs(batch.flat)
        sums = batch.sums(values_R)
        weights = torch.linspace(-1, 1, len(sums))
        ((sums * weights).sum() + 0.1 * batch.rest(values_R).sum()).backward()
        outcomes.append((sums.detach(), gradients(model)))
    (shared, shared_grads), (apart, apart_grads) = outcomes
    assert torch.allclose(shared, apart, rtol=1e-5, atol=1e-4)
    for one, other in zip(shared_grads, apart_grads, strict=True):
        assert float((one - other).norm()) <= 2e-5 * float(other.norm()) + 1e-7


def gradients(model) -> list[torch.Tensor]:
    found = [one.grad.clone() for one in model.trainable().values() if one.grad is not None]
    for one in model.trainable().values():
        one.grad = None
    return found


def test_log_probs_are_what_the_loss_adds_up(tmp_path: Path) -> None:
    model = open_model(write_model(LEAN["llama"], tmp_path), lora=None)
    samples = [(ids(3, 40), [place > 9 for place in range(40)]), (ids(5, 7), [True] * 7)]
    batch = flatten(samples)
    expected = model.loss_sum(batch).item()
    assert -model.log_probs(batch).sum().item() == pytest.approx(expected, rel=1e-6)


def test_the_row_of_an_answers_end_has_seen_all_of_it() -> None:
    batch = flatten_ends([fork(5, 4, 9), fork(2, 3)])
    assert batch.rows_R.tolist() == [8, 17, 22]


@pytest.mark.parametrize("has_bias", [True, False])
def test_chunked_log_probs_are_those_of_all_logits(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.nn.cross_entropy.CHUNK_LOGITS", 20 * 33)
    dice = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=dice).requires_grad_() for rows in (70, 33))
    bias = torch.randn(33, generator=dice).requires_grad_() if has_bias else None
    targets = torch.randint(33, (70,), generator=dice)
    grad = torch.randn(70, generator=dice)
    ours = linear_log_probs(hidden, weight, targets, bias)
    theirs = -functional.cross_entropy(
        functional.linear(hidden, weight, bias), targets, reduction="none"
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    leaves = (hidden, weight) if bias is None else (hidden, weight, bias)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, grad),
        torch.autograd.grad(theirs, leaves, grad),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-4)

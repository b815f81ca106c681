"""Sampling: golden values and the laws behind them."""

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch

from tunesmith.infer.draw import Draw
from tunesmith.infer.sampler import Score, weaken_seen
from tunesmith.infer.sampler import sample as sample_picks
from tunesmith.nn.sampling import keep_top_k, keep_top_p, pick, tempered
from tunesmith.spec.chat import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


class Fixed(Random):
    """Gives one number, always."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


def draw(uniform: float = 0.0, generated: tuple[int, ...] = (), **asked: object) -> Draw:
    made = Draw(Sampling.model_validate(asked), (3,), {2}, Fixed(uniform))
    for id_ in generated:
        made.push(id_)
    return made


def sample(logits_BV: torch.Tensor, draws: list[Draw]) -> list[int | None]:
    return [each.id for each in sample_picks(logits_BV, draws)]


def kept(logits_BV: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits_BV]


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    rows = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4, 1)
    assert kept(keep_top_p(rows, torch.tensor([0.4, 0.7, 0.9, 1.0]))) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_a_tiny_top_p_keeps_the_likeliest() -> None:
    assert kept(keep_top_p(LOGITS[None], torch.tensor([1e-9]))) == [[0]]


def test_top_k_is_each_rows_own() -> None:
    rows = keep_top_k(LOGITS.repeat(3, 1), torch.tensor([1, 3, 0]))
    assert kept(rows) == [[0], [0, 1, 2], [0, 1, 2, 3]]


def expected(logits_V: torch.Tensor, asked: Sampling) -> torch.Tensor:
    """The plain way: everything sorted and masked, in transformers' order."""
    row = tempered(logits_V[None].double(), asked.temperature)
    row = keep_top_k(row, torch.tensor([asked.top_k]))
    row = keep_top_p(row, torch.tensor([asked.top_p], dtype=torch.float64))
    weights = row.softmax(-1)[0]
    weights[weights < asked.min_p * weights.max()] = 0
    return weights / weights.sum()


def odds(logits_V: torch.Tensor, count: int, **asked: Any) -> torch.Tensor:
    """How often each id is drawn, by numbers spread evenly."""
    rows = logits_V.repeat(count, 1)
    ids = sample(rows, [draw((i + 0.5) / count, **asked) for i in range(count)])
    return torch.bincount(torch.tensor(ids), minlength=len(logits_V)) / count


WISHES: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"temperature": 2, "min_p": 0.1},
    {"temperature": 1e-300},
    {"temperature": 1, "top_k": 1},
    {"temperature": 1, "top_k": 7, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.99, "min_p": 0.01},
    {"temperature": 1, "top_k": 5000, "top_p": 1e-9},
    {"temperature": 2, "top_k": 300},
]


@pytest.mark.parametrize("asked", WISHES, ids=str)
@pytest.mark.parametrize("size", [4, 1000, 3000])
def test_ids_are_drawn_as_often_as_the_plain_way_says(asked: dict[str, Any], size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(size) * 2
    theirs = expected(logits, Sampling.model_validate(asked))
    own = odds(logits, 500, **asked)
    assert (own - theirs).abs().max() < 1.01 / 500
    assert not own[theirs == 0].any()


def test_a_flat_row_reaches_its_top_p_however_many_ids_that_takes() -> None:
    own = odds(torch.zeros(9000), 2000, temperature=1, top_p=0.5)
    assert (own > 0).sum() > 1500
    assert own.nonzero().max() < 9000


def test_repetition_penalty_weakens_both_signs() -> None:
    weakened = weaken_seen(torch.tensor([3.0, -3.0]), 1.5)
    assert weakened.tolist() == [2.0, -4.5]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    row = torch.tensor([[0.0, 1.0, 0.0, 1.1]])
    assert sample(row.clone(), [draw(temperature=0)]) == [3]
    assert sample(row.clone(), [draw(temperature=0, repetition_penalty=1.5)]) == [1]
    assert sample(row.clone(), [draw(temperature=0, presence_penalty=2)]) == [3]
    assert sample(row.clone(), [draw(temperature=0, presence_penalty=2, generated=(3,))]) == [1]


def test_frequency_penalty_grows_with_each_repeat() -> None:
    row = torch.tensor([[1.0, 0.0, 0.0]])
    asked = {"temperature": 0, "frequency_penalty": 0.4}
    assert sample(row.clone(), [draw(generated=(0, 0), **asked)]) == [0]
    assert sample(row.clone(), [draw(generated=(0, 0, 0), **asked)]) == [1]


def test_a_bias_is_added_to_its_tokens_alone() -> None:
    rows = LOGITS.repeat(2, 1)
    asked: Any = {"temperature": 0, "logit_bias": {3: 100, 0: -100}}
    assert sample(rows, [draw(temperature=0, logit_bias={2: 2.5}), draw(**asked)]) == [2, 3]
    assert rows.equal(LOGITS.repeat(2, 1))


def test_no_stop_token_is_drawn_before_min_tokens() -> None:
    row = torch.tensor([[0.0, 1.0, 9.0]])
    asked: Any = {"temperature": 0, "min_tokens": 2}
    assert sample(row, [draw(generated=(0,), **asked)]) == [1]
    assert sample(row, [draw(generated=(0, 0), **asked)]) == [2]


def test_a_row_of_bans_alone_still_has_a_choice() -> None:
    row = torch.tensor([[-torch.inf, -torch.inf, 9.0]])
    assert sample(row, [draw(0.5, min_tokens=1, temperature=1)]) == [2]


def test_a_row_that_is_not_a_number_spoils_no_other() -> None:
    rows = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 2.0, 1.0], [torch.inf, 0.0, 0.0]])
    assert sample(rows, [draw(0.4, temperature=1)] * 3)[::2] == [None, None]
    assert sample(rows, [draw(temperature=0)] * 3) == [None, 1, None]


def test_log_probabilities_are_the_models_own_whatever_is_drawn() -> None:
    asked: Any = {"temperature": 0, "logit_bias": {3: 100}, "top_logprobs": 2}
    rows = torch.stack([LOGITS, LOGITS + 50, LOGITS])
    picks = sample_picks(rows, [draw(**asked), draw(top_logprobs=0), draw()])
    told = LOGITS.log_softmax(0).tolist()
    first = picks[0].score
    assert first is not None
    assert (picks[0].id, [id_ for id_, _ in first.top]) == (3, [0, 1])
    assert [first.logprob, *(each for _, each in first.top)] == pytest.approx([told[3], *told[:2]])
    assert picks[1].score == Score(pytest.approx(told[0], abs=1e-5), ())
    assert picks[2].score is None


def picked(weights_V, uniform):
    return int(pick(weights_V[None], torch.tensor([uniform], dtype=torch.float64))[0])


@pytest.mark.parametrize(
    ("uniform", "expected"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.79, 1), (0.8, 3), (0.999999, 3)]
)
def test_a_uniform_number_is_looked_up_in_the_distribution(uniform: float, expected: int) -> None:
    assert picked(torch.tensor([0.5, 0.3, 0.0, 0.2]), uniform) == expected


def test_a_token_of_weight_zero_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 0.3, 0.7, 0.0])
    assert {picked(weights, i / 1000) for i in range(1000)} == {1, 2}


def test_draws_follow_the_weights() -> None:
    random, weights = Random(1), torch.tensor([0.1, 0.2, 0.7])
    counts = Counter(picked(weights, random.random()) for _ in range(4000))
    assert [round(counts[i] / 4000, 1) for i in range(3)] == [0.1, 0.2, 0.7]


def test_a_row_is_sampled_alike_alone_and_among_others() -> None:
    torch.manual_seed(3)
    rows = torch.randn(6, 50)
    draws = [draw(0.37, temperature=0.9, top_p=0.8, top_k=k) for k in (0, 1, 5, 20, 50, 90)]
    together = sample(rows.clone(), draws)
    alone = [sample(rows[i : i + 1].clone(), [draws[i]])[0] for i in range(6)]
    assert together == alone


def test_equal_logits_are_drawn_alike_whoever_is_beside_them() -> None:
    torch.manual_seed(4)
    rows = (torch.randn(4, 5000) * 2).round()
    alone = [draw(0.7, temperature=1, top_p=0.3), draw(0.2, temperature=1, top_k=40)]
    wide = [draw(0.5, temperature=1, top_k=3000), draw(0.5, temperature=1, top_k=150)]
    assert sample(rows, alone + wide)[:2] == sample(rows[:2], alone)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    rows = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 9.0]])
    assert sample(rows, [draw(temperature=0), draw(0.5, temperature=1)]) == [1, 2]

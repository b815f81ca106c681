"""Batches, attention and the loss, each against the plainest way to write it."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.nn.attention import AttentionRule, Bounds, Segments, attend
from tunesmith.nn.batch import flatten
from tunesmith.nn.cross_entropy import linear_cross_entropy_sum
from tunesmith.nn.kernels import EAGER, compiled
from tunesmith.nn.matmul import product
from tunesmith.nn.packed import pack
from tunesmith.nn.rows import last_rows

BOUNDS = (0, 5, 130, 131, 400, 460, 700, 2000)
"""Short segments, some for the products by head, and one for the flash kernel."""


def test_samples_become_one_row_and_only_labels_are_predicted() -> None:
    batch = flatten([([10, 11, 12], [True, False, True]), ([20, 21], [True, True])])
    assert batch.ids_T.tolist() == [10, 11, 12, 20, 21]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.bounds == (0, 3, 5)
    assert batch.rows_R.tolist() == [1, 3]
    assert batch.targets_R.tolist() == [12, 21]
    assert (len(batch), batch.labels) == (5, 2)


def test_the_last_layer_keeps_each_segment_from_its_first_label_row() -> None:
    samples = [
        ([1, 2, 3, 4], [False, False, True, False]),
        ([5, 6], [False] * 2),
        ([7, 8], [True] * 2),
    ]
    rows = last_rows(flatten(samples), step=4)
    assert rows.kept_K.tolist()[:5] == [1, 2, 3, 6, 7]
    assert len(rows.kept_K) == 8
    assert rows.bounds == (0, 3, 3, 5)
    assert rows.labels_R.tolist() == [0, 3]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, query_bounds: Bounds, rule: AttentionRule
) -> Tensor:
    groups, parts = q.shape[0] // k.shape[0], []
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    for (a, b), (c, d) in zip(pairwise(bounds), pairwise(query_bounds), strict=True):
        scores = q[:, c:d] @ k[:, a:b].transpose(1, 2) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        distance = torch.arange(b - a - (d - c), b - a)[:, None] - torch.arange(b - a)
        hidden = (distance < 0) | (distance >= (rule.window or 10**9))
        parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, a:b])
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_and_its_gradients_stay_inside_their_segment(
    kv_heads: int, window: int | None, share: float, softcap: float | None
) -> None:
    dice = torch.Generator().manual_seed(0)
    query_bounds = [0]
    for a, b in pairwise(BOUNDS):
        query_bounds.append(query_bounds[-1] + int((b - a) * share))
    queries = query_bounds[-1]
    q, k, v = (
        torch.randn(heads, rows, 16, generator=dice, requires_grad=True)
        for heads, rows in ((4, queries), (kv_heads, BOUNDS[-1]), (kv_heads, BOUNDS[-1]))
    )
    rule = AttentionRule(0.25, window, softcap)
    grad = torch.randn(queries, 4, 16, generator=dice)
    ours = attend(q, k, v, Segments(BOUNDS, tuple(query_bounds)), rule)
    theirs = plain_attention(q, k, v, BOUNDS, tuple(query_bounds), rule)
    assert torch.allclose(ours, theirs, atol=1e-5)
    found = torch.autograd.grad(ours, (q, k, v), grad)
    expected = torch.autograd.grad(theirs, (q, k, v), grad)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 50])
def test_the_kernel_for_all_segments_is_close_to_one_for_each(window: int | None) -> None:
    dice = torch.Generator().manual_seed(0)
    heads = {"q": 4, "k": 2, "v": 2}
    q, k, v = (torch.randn(one, BOUNDS[-1], 64, generator=dice) for one in heads.values())
    rule = AttentionRule(0.125, window)
    halved = attend(*(one.cuda().bfloat16() for one in (q, k, v)), Segments(BOUNDS), rule)
    exact = attend(q, k, v, Segments(BOUNDS), rule)
    assert torch.allclose(halved.float().cpu(), exact, atol=3e-2)


def test_spare_rows_give_and_get_nothing() -> None:
    q, k, v = (torch.randn(2, 140, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, Segments((0, 120)), AttentionRule(0.3))
    assert out.shape == (140, 2, 8)
    assert not out[120:].any()
    out.sum().backward()
    assert all(one.grad is not None and not one.grad[:, 120:].any() for one in (q, k, v))


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_chunked_loss_is_cross_entropy(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.nn.cross_entropy.CHUNK_LOGITS", 20 * 33)
    dice = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=dice).requires_grad_() for rows in (70, 33))
    bias = torch.randn(33, generator=dice).requires_grad_() if has_bias else None
    leaves = [one for one in (hidden, weight, bias) if one is not None]
    targets = torch.randint(33, (70,), generator=dice)
    ours = linear_cross_entropy_sum(hidden, weight, targets, bias) * 0.5
    logits = functional.linear(hidden, weight, bias)
    theirs = functional.cross_entropy(logits, targets, reduction="sum") * 0.5
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found, expected = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    linear_cross_entropy_sum(hidden, weight, torch.tensor([0, 1, 2, 3])).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_product_is_the_same_whatever_the_strides() -> None:
    dice = torch.Generator().manual_seed(0)
    wide, tall = torch.randn(70, 300, generator=dice), torch.randn(300, 70, generator=dice)
    plus, bias = torch.randn(70, 70, generator=dice), torch.randn(70, generator=dice)
    for x in (wide, tall.t(), torch.randn(70, 600, generator=dice)[:, ::2]):
        for w in (wide, tall.t()):
            for extra in ({}, {"bias_N": bias}, {"plus_MN": plus}):
                expected = x @ w.t() + sum(extra.values(), torch.zeros(()))
                assert torch.allclose(product(x, w, **extra), expected, atol=1e-4)


def test_compiled_arithmetic_is_the_eager_one() -> None:
    dice = torch.Generator().manual_seed(0)
    x, grad = torch.randn(65, 32, generator=dice), torch.randn(65, 32, generator=dice)
    weight, fast = torch.randn(32, generator=dice), compiled()
    _, inverse = EAGER.rms_norm(x, weight, 1e-5)
    for ours, theirs in (
        (fast.rms_norm_input, EAGER.rms_norm_input(x, weight, inverse, grad)),
        (EAGER.rms_norm_input, fast.rms_norm_input(x, weight, inverse, grad)),
    ):
        assert torch.allclose(ours(x, weight, inverse, grad), theirs, atol=1e-5)
    weights = (fast.rms_norm_weight(x, inverse, grad), EAGER.rms_norm_weight(x, inverse, grad))
    assert torch.allclose(*weights, atol=1e-4)
    assert torch.allclose(fast.swiglu(x), EAGER.swiglu(x), atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_weight_that_lies_transposed_is_packed_as_it_reads(precision):
    """GPT-2 keeps its weights so."""
    torch.manual_seed(0)
    weight_KN, x_TK = torch.randn(64, 48), torch.randn(5, 64)
    found = pack(weight_KN.T, None, precision).product(x_TK)
    torch.testing.assert_close(found, x_TK @ weight_KN, atol=0.5, rtol=0.05)

"""Packed linear layers against plain products."""

import pytest
import torch
import torch.nn.functional as F

from tunesmith.nn.packed import Precision, apply, pack, rounded

LIMITS: dict[Precision, float] = {"fp32": 1e-6, "bf16": 5e-3, "int8": 1.5e-2}


@pytest.mark.parametrize("precision", list(LIMITS))
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_products_are_those_of_the_weights(precision: Precision, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 96), torch.randn(160, 96), torch.randn(160)
    expected = F.linear(x, weight, bias)
    with torch.inference_mode():
        packed = pack(weight, bias, precision)
        error = (apply(packed, x) - expected).norm() / expected.norm()
        onto = (packed.onto(x, expected) - 2 * expected).norm() / expected.norm()
    assert max(float(error), float(onto)) < LIMITS[precision]
    assert torch.allclose(packed.lengths(), weight.norm(dim=1), rtol=1e-2)


def test_a_row_of_whole_numbers_owes_nothing_to_its_neighbours() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.randn(32, 64)
    crowd = torch.cat([x, 1000 * torch.randn(28, 64)])
    with torch.inference_mode():
        packed = pack(weight, None, "int8")
        assert torch.equal(packed.product(x), packed.product(crowd)[:4])


def test_a_row_of_zeros_gives_zeros() -> None:
    for precision in LIMITS:
        with torch.inference_mode():
            packed = pack(torch.randn(8, 16), None, precision)
            assert not packed.product(torch.zeros(2, 16)).any()


def test_few_counts_of_rows_occur() -> None:
    assert [rounded(rows) for rows in (1, 3, 5, 33, 65, 200)] == [1, 3, 8, 40, 96, 224]
    assert len({rounded(rows) for rows in range(1, 513)}) < 32

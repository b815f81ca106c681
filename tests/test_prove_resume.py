"""The proof that a training goes on to the same bits: it sees a bit, and has every method."""

from typing import get_args

from prove.resume import KINDS, _differences, _told
from tunesmith.spec.train import AnySpec


def step(number: int, loss: float, **over: object) -> dict[str, object]:
    return {"type": "step", "step": number, "loss": loss, "cpu_seconds": 1.0, **over}


def test_a_bit_and_a_step_that_lacks_are_seen_and_time_is_not() -> None:
    calm = _told([step(1, 0.1), step(2, 0.3)])
    assert _differences(calm, _told([step(1, 0.1, cpu_seconds=2.0), step(2, 0.3)])) == []
    assert len(_differences(calm, _told([step(1, 0.1), step(2, 0.1 + 0.2)]))) == 1
    assert len(_differences(calm, _told([step(1, 0.1)]))) == 1
    twice = _told([step(1, 0.1), step(1, 0.2), step(2, 0.3)])
    assert len(_differences(calm, twice)) == 1


def test_no_method_is_missing() -> None:
    proven = {type(kind.spec()) for kind in KINDS.values()}
    assert proven == set(get_args(AnySpec))

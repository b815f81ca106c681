"""How much of a prompt goes beside others' next tokens."""

import subprocess
import sys

from tunesmith.infer.pace import LEAST, Pace


def paced(plain: float, token: float, most: int = 256) -> Pace:
    """After some steps on a machine of that kind."""
    pace = Pace(64, most)
    for _ in range(20):
        pace.note(0, plain)
        pace.note(pace.tokens(), plain + pace.tokens() * token)
    return pace


def test_it_needs_no_torch() -> None:
    code = "import sys, tunesmith.infer.pace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_before_anything_is_known_a_step_is_tried_with_next_to_no_prompt_in_it() -> None:
    pace = Pace(64, 256)
    assert pace.tokens() == LEAST
    pace.note(LEAST, 0.04)
    assert pace.tokens() == 64


def test_a_step_with_a_part_of_a_prompt_takes_less_than_twice_as_long() -> None:
    plain, token = 0.040, 0.0008
    tokens = paced(plain, token).tokens()
    assert 1.4 * plain < plain + tokens * token < 2 * plain


def test_where_prompts_cost_next_to_nothing_all_that_fits_goes() -> None:
    assert paced(0.020, 1e-6).tokens() == 256


def test_a_prompt_always_moves_on() -> None:
    assert paced(0.001, 0.01).tokens() == LEAST

"""Progress and curves as text."""

import io
from typing import Any

import pytest

from tunesmith.cli.curve import curve, shrink, spark
from tunesmith.cli.progress import Course, Progress, bar, headline, plain_line
from tunesmith.cli.text import bytes_text, clean, columns, duration_text


def step(number: int, total: int = 100, **over: Any) -> dict[str, Any]:
    return {
        "type": "step",
        "step": number,
        "total_steps": total,
        "loss": 5.0 / number,
        "learning_rate": 2e-4,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": 2_500_000_000,
        "eta_seconds": 90.0,
        **over,
    }


def test_without_a_terminal_there_are_plain_lines() -> None:
    out = io.StringIO()
    with Progress("a1b2c3d4", out) as progress:
        progress.take({"type": "queued", "seq": 1, "data": {}})
        progress.take({"type": "started", "total_steps": 100, "start_step": 0})
        for number in range(1, 101):
            progress.take(step(number))
        progress.take({"type": "succeeded", "seq": 9, "data": {"artifact": "outputs/x"}})
    lines = out.getvalue().splitlines()
    assert lines[0] == "a1b2c3d4  queued"
    assert lines[2].startswith("a1b2c3d4  running  step 5/100  loss 1.0000  lr 2.00e-04  1,23")
    assert lines[2].endswith("2.5 GB  ETA 1:30")
    assert lines[-1].startswith("a1b2c3d4  completed  step 100/100")
    assert len(lines) <= 25
    assert "\x1b" not in out.getvalue()
    assert progress.course.artifact == "outputs/x"


def test_both_kinds_of_event_are_understood() -> None:
    plain, wrapped = Course(), Course()
    fields = step(7)
    plain.take(fields)
    wrapped.take({"seq": 3, "at": 1.0, "type": fields.pop("type"), "data": fields})
    assert plain == wrapped


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": "step"},
        {"type": "step", "loss": None, "step": "x", "total_steps": float("nan")},
        {"type": "evaluated", "metrics": 5},
        {"type": "failed", "message": None},
        {"type": "something new", "data": {"x": 1}},
    ],
)
def test_an_event_of_another_shape_is_passed_over(event: dict[str, Any]) -> None:
    out = io.StringIO()
    with Progress("x", out) as progress:
        progress.take(event)
    assert progress.course.losses == []


def test_the_time_left_is_told_after_five_steps() -> None:
    course = Course()
    course.take({"type": "started", "start_step": 40, "total_steps": 100})
    course.take(step(44))
    assert course.eta_seconds is None
    course.take(step(45))
    assert course.eta_seconds == 90


def test_the_curve_is_the_policys_and_not_its_reward_models() -> None:
    course = Course()
    for step, trial in enumerate(("reward_model", "reward_model", None, None), 1):
        course.take({"type": "step", "step": step, "loss": step / 2, "trial": trial})
    assert course.losses == [1.5, 2.0]


def test_reinforcement_shows_its_reward_and_divergence() -> None:
    course = Course()
    for number, reward in enumerate((0.25, 0.75), 1):
        metrics = {"reward/mean": reward, "kl_divergence": 0.01}
        course.take({"type": "step", "step": number, "loss": -0.1, "metrics": metrics})
    course.take({"type": "evaluated", "step": 2, "metrics": {"eval_reward/mean": 0.5}})
    assert course.curve == ("reward", [0.25, 0.75])
    line = plain_line(course)
    assert "reward 0.7500  eval reward 0.500  KL 0.0100" in line
    assert "loss" not in line


def test_what_the_model_answered_is_shown_beside_its_loss() -> None:
    course = Course()
    course.take(step(3))
    metrics = {"eval_loss": 0.5, "eval_rougeL": 0.875, "eval_exact_match": 0.25}
    course.take({"type": "evaluated", "step": 3, "metrics": metrics})
    assert "eval 0.5000  rougeL 0.875  exact 0.250" in plain_line(course)


def test_a_terminal_gets_a_bar_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    out = io.StringIO()
    with Progress("a1b2c3d4", out, is_live=True, now=iter(range(1000)).__next__) as progress:
        for number in range(1, 60):
            progress.take(step(number))
        progress.take({"type": "notice", "level": "warning", "message": "loud \x1b]0;x\x07row"})
    text = out.getvalue()
    assert "59/100" in text
    assert "warning: loud ]0;xrow" in text
    assert "━" in text


def test_the_headline_keeps_within_its_width() -> None:
    course = Course(phase="running", step=1234, total_steps=98765, eta_seconds=86_400)
    for width in (60, 80, 200):
        assert len(headline(course, "a1b2c3d4", width)) <= width


def test_a_curve_shows_its_scale_and_falls() -> None:
    text = curve([4.0, 3.0, None, 2.0, float("nan"), 1.0], width=40, height=4)
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("       4 │█")
    assert lines[-1] == "       1 │███▁"


def test_curves_of_little_or_nothing() -> None:
    assert curve([]) == "(no values)"
    assert curve([None, float("inf")]) == "(no values)"
    assert len(curve([2.0]).splitlines()) == 8
    assert spark([]) == ""
    assert spark([1.0, 1.0]) == "▅▅"
    assert spark([3.0, 2.0, 1.0]) == "█▅▁"


def test_a_long_series_is_shrunk_by_means() -> None:
    assert shrink([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert len(spark([float(n) for n in range(10_001)], 33)) == 33
    assert max(map(len, curve([float(n) for n in range(999)], width=50).splitlines())) <= 50


def test_words_for_sizes_and_times() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 3.2e9)] == ["0 B", "999 B", "1.0 kB", "3.2 GB"]
    assert [duration_text(n) for n in (None, 0, 61, 3725)] == ["–", "0:00", "1:01", "1:02:05"]
    assert bar(0.5, 4) == "━━──"


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    assert clean("\x1b[2Jx\x9b31m\r\x07 한 👩‍👩‍👧\n\ty") == "[2Jx31m 한 👩‍👩‍👧\n\ty"


def test_columns_line_up_under_wide_letters() -> None:
    text = columns([["팀", "1"], ["ab🎉", "2\n3"]], ["NAME", "N"])
    assert text.splitlines() == ["NAME  N", "팀    1", "ab🎉  2 3"]

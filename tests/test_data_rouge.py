"""ROUGE-L: what shares words in order is near."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.rouge import common, rouge_l, words


@pytest.mark.parametrize(
    ("answer", "reference", "nearness"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" against two others.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The cat, sat!", "the cat sat", 1.0),
        ("a b", "a b c d", 2 * 2 / 6),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("今天天气很好", "今天天气不好", 5 / 6),
        ("서울입니다", "서울이에요", 2 * 2 / 10),
        ("🎉 fine", "🎉 bad", 1 / 2),
        ("caf\u00e9", "cafe\u0301", 1.0),
    ],
)
def test_nearness_is_that_of_the_paper(answer: str, reference: str, nearness: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(nearness)


def test_words_are_taken_as_they_are_written() -> None:
    assert words("Don't_go to 東京tower2 😀!") == [
        "don",
        "t",
        "go",
        "to",
        "東",
        "京",
        "tower2",
        "😀",
    ]


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_the_longest_common_subsequence_is_found(first: str, second: str) -> None:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    assert common(list(first), list(second)) == longest(0, 0)

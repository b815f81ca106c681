"""Log-probabilities: those of a prompt, read while it is computed, and how OpenAI writes them.

T rows of a chunk, V vocabulary entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tunesmith.infer.lexicon import Lexicon
from tunesmith.infer.sampler import Score, score

_ROWS = 64
"""Rows whose logits are reduced at once: their copies in fp32 are what it costs."""


class PromptScores:
    """Reads how likely each token of a prompt is, after those before it."""

    kind: Literal["logits", "hidden"] = "logits"

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        self._prompt, self._top = prompt, top
        self.scores: list[Score | None] = [None]
        """By position; the first has none."""

    def read(self, start: int, rows: Tensor) -> None:
        for at in range(0, len(rows), _ROWS):
            self._read(start + at, rows[at : at + _ROWS])

    def _read(self, start: int, rows_TV: Tensor) -> None:
        """Rows that were read before, and rows past the prompt, are left out."""
        first = len(self.scores) - 1
        followers = self._prompt[max(first, start) + 1 : start + len(rows_TV) + 1]
        if followers and start <= first:
            wanted = rows_TV[first - start :][: len(followers)]
            self.scores += score(wanted, followers, [self._top] * len(followers))


@dataclass(frozen=True, slots=True)
class Said:
    """A token of an answer, and where its text begins in it, in characters."""

    id: int
    offset: int
    score: Score | None


def chat_logprobs(said: Sequence[Said], lexicon: Lexicon) -> dict[str, Any]:
    """As a chat's choice has them."""
    content = [
        {
            **_told(each.id, each.score.logprob, lexicon),
            "top_logprobs": [_told(id_, logprob, lexicon) for id_, logprob in each.score.top],
        }
        for each in said
        if each.score is not None
    ]
    return {"content": content, "refusal": None}


def _told(id_: int, logprob: float, lexicon: Lexicon) -> dict[str, Any]:
    name = lexicon.name(id_)
    return {"token": name, "logprob": _finite(logprob), "bytes": list(lexicon.bytes_of(id_))}


def completion_logprobs(said: Sequence[Said], lexicon: Lexicon) -> dict[str, Any]:
    """As a plain completion's choice has them; a prompt's first token has none."""
    return {
        "tokens": [lexicon.name(each.id) for each in said],
        "token_logprobs": [each.score and _finite(each.score.logprob) for each in said],
        "top_logprobs": [each.score and _by_name(each.id, each.score, lexicon) for each in said],
        "text_offset": [each.offset for each in said],
    }


def _by_name(id_: int, score: Score, lexicon: Lexicon) -> dict[str, float]:
    """The likeliest, and the token itself. Of those that are written alike the likeliest."""
    told: dict[str, float] = {}
    for each, logprob in [*score.top, (id_, score.logprob)]:
        told.setdefault(lexicon.name(each), _finite(logprob))
    return told


def _finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999.0 for what cannot be."""
    return max(logprob, -9999.0)

"""Held-out rows answered by the model, and how near that comes to the answers that stand there."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.data.asked import asked
from tunesmith.data.holdout import Rows
from tunesmith.data.render import Renderer
from tunesmith.data.rouge import rouge_l
from tunesmith.train.parallel import Group
from tunesmith.train.prompts import Prompt, prompt_ids
from tunesmith.train.rollout import Completion, Rollouts, Wish
from tunesmith.train.source import read_row

CACHE_TOKENS = 1 << 13
"""Of keys and values held at once, beside what training holds."""


@dataclass(frozen=True, slots=True)
class Question(Prompt):
    reference: str


@dataclass(frozen=True)
class Exam:
    """The same questions at each evaluation, answered with the likeliest tokens."""

    rollouts: Rollouts
    wish: Wish
    renderer: Renderer
    questions: Sequence[Question]

    def marks(self, group: Group) -> dict[str, float]:
        """Mean ROUGE-L, and the share of answers that are the reference to the letter, outer white
        space aside. Raises Interrupted at a stop. The model is to be out of training mode."""
        mine = group.share(self.questions)
        found = self.rollouts.sample([one.ids for one in mine], self.wish) if mine else []
        pairs = [(self._text(one), mine[one.prompt].reference) for one in found]
        near = sum(rouge_l(said, wanted) for said, wanted in pairs)
        exact = sum(said.strip() == wanted.strip() for said, wanted in pairs)
        near_sum, exact_sum, count = group.add_up(near, exact, len(pairs))
        return {"rougeL": near_sum / count, "exact_match": exact_sum / count}

    def _text(self, answer: Completion) -> str:
        ids = answer.ids[:-1] if answer.finish == "stop" else answer.ids
        return self.renderer.decode(ids)


def draw_questions(
    rows: Rows, renderer: Renderer, count: int, context: int, seed: int
) -> list[Question]:
    """Up to `count` rows that have an answer, and leave room for one; the same ones by the seed."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    found: list[Question] = []
    for question in _questions(rows, renderer, order):
        if len(found) == count:
            break
        if 0 < question.tokens < context:
            found.append(question)
    return found


def _questions(rows: Rows, renderer: Renderer, order: Sequence[int]) -> Iterator[Question]:
    for place in order:
        row = read_row(rows, place)
        reference = asked(row).reference
        if reference:
            yield Question(place, prompt_ids(renderer, row), reference)

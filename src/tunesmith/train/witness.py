"""What the trained model says of a few held-out rows, written beside its artifact.

Whoever serves it has to say the same: see `infer/gate.py`. B rows, R tokens in all, V vocabulary.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.holdout import Rows
from tunesmith.data.parity import Rendered, adapter_facts, facts_of, rendered, told
from tunesmith.data.render import Renderer
from tunesmith.errors import JobFailure, ValidationError
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel
from tunesmith.nn.sums import Sums, sums_of
from tunesmith.spec.parity import (
    ANSWER_TOKENS,
    CONVERSATIONS,
    MAX_TOKENS,
    Spoken,
    Told,
    Witnessed,
)
from tunesmith.train.rollout import Rollouts, Wish
from tunesmith.train.source import read_row


@dataclass(frozen=True)
class Witness:
    model: LanguageModel
    renderer: Renderer
    rows: Rows
    """Held out, where some are."""
    precision: str
    device: str
    seed: int
    base_facts: Mapping[str, Any]
    """Of what an adapter stands on, as it was opened."""

    def write(self, place: Path, saved: Path, model: str = ".") -> None:
        """To `place`, of what was just saved in a folder, which is the artifact's `model`.

        A training that is not over goes on as if nothing had been asked.
        """
        self.model.eval()
        try:
            self._write(place, saved, model)
        finally:
            self.model.train()

    def _write(self, place: Path, saved: Path, model: str) -> None:
        is_adapter = (saved / "adapter_config.json").exists()
        facts = dict(self.base_facts) | adapter_facts(saved) if is_adapter else facts_of(saved)
        witnessed = Witnessed(
            model=model,
            precision=self.precision,
            at=time.time(),
            stop_ids=tuple(sorted(self.renderer.stop_ids)),
            facts=facts,
            sums=_finite(sums_of(self.model.weights())),
            spoken=tuple(self._spoken()),
        )
        place.parent.mkdir(exist_ok=True)
        place.write_text(witnessed.model_dump_json(exclude_none=True) + "\n", "utf-8")

    @torch.no_grad()
    def _spoken(self) -> list[Spoken]:
        drawn = self._draw()
        if not drawn:
            return []
        questions = [one.question for _, one in drawn]
        answers = self._answers(questions)
        log_probs = self._log_probs([one.ids for _, one in drawn])
        margins = self._margins(questions, answers)
        return [
            Spoken(
                told=row,
                text_sha256=one.text_sha256,
                ids=tuple(one.ids),
                log_probs=tuple(log_probs[place]),
                question=tuple(one.question),
                answer=tuple(answers[place]),
                margins=tuple(margins[place]),
            )
            for place, (row, one) in enumerate(drawn)
            if _are_finite([*log_probs[place], *margins[place]])
        ]

    @property
    def _answer_tokens(self) -> int:
        return max(1, min(ANSWER_TOKENS, self.model.context_length // 2))

    def _draw(self) -> list[tuple[Told, Rendered]]:
        most = max(1, min(MAX_TOKENS, self.model.context_length - self._answer_tokens))
        order = list(range(len(self.rows)))
        random.Random(self.seed).shuffle(order)
        found: list[tuple[Told, Rendered]] = []
        for place in order:
            if len(found) == CONVERSATIONS:
                break
            try:
                row = told(read_row(self.rows, place))
                found.append((row, rendered(self.renderer, row, most)))
            except (ValidationError, JobFailure):  # left out of the training too
                continue
        return found

    def _answers(self, questions: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        wish = Wish(self._answer_tokens, frozenset(), temperature=0)
        rollouts = Rollouts(self.model, self.device)
        return [one.ids for one in rollouts.sample(questions, wish)]

    def _log_probs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        counts = [len(ids) - 1 for ids in rows]
        if not any(counts):
            return [[] for _ in rows]
        batch = flatten([(ids, [True] * len(ids)) for ids in rows], self.device)
        return _apart(self.model.log_probs(batch), counts)

    def _margins(
        self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        samples = [
            ([*question, *answer], [False] * len(question) + [True] * len(answer))
            for question, answer in zip(questions, answers, strict=True)
        ]
        logits_RV = self.model.logits(flatten(samples, self.device))
        best_R2 = logits_RV.float().topk(2, dim=-1).values
        return _apart(best_R2[:, 0] - best_R2[:, 1], [len(answer) for answer in answers])


def _are_finite(numbers: Sequence[float]) -> bool:
    """A model may have tokens whose weights are no numbers: nothing of theirs can be compared."""
    return all(map(math.isfinite, numbers))


def _finite(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    return {name: one for name, one in sums.items() if _are_finite(one)}


def _apart(values_R: torch.Tensor, counts: Sequence[int]) -> list[list[float]]:
    parts = torch.split(values_R, list(counts))
    return [[round(float(one), 7) for one in part] for part in parts]

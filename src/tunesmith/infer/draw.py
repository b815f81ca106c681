"""What sampling knows of one sequence beside its logits: plain numbers, kept up token by token."""

from collections import Counter
from collections.abc import Iterable
from random import Random

import numpy as np
from numpy.typing import NDArray

from tunesmith.infer.guide import Guide
from tunesmith.spec.chat import Sampling

BAN = -1e30
"""Added to a logit that must not win; finite, so that a row is never without a choice."""

_ROOM = (0,) * 64

Ids = NDArray[np.int64]
Amounts = NDArray[np.float32]


class Counts:
    """Distinct ids and how often each came, in arrays that grow."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        known = Counter(ids)
        self._places = {id_: place for place, id_ in enumerate(known)}
        self._ids = np.array([*known, *_ROOM], np.int64)
        self._counts = np.array([*known.values(), *_ROOM], np.float32)

    def push(self, id_: int) -> None:
        place = self._places.setdefault(id_, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = id_
        self._counts[place] += 1

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Amounts:
        return self._counts[: len(self._places)]


class Draw:
    """One sequence's wishes, and what of its past they hang on.

    `random` is its own: the n-th token owes nothing to whatever else is in the batch.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int] = (),
        stop_ids: Iterable[int] = (),
        random: Random | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.sampling = sampling
        self.guide = guide
        self._random = random or Random()
        self._pushed = 0
        has_counts = sampling.presence_penalty or sampling.frequency_penalty
        self._seen = Counts(prompt) if sampling.repetition_penalty != 1 else None
        self._said = Counts() if has_counts else None
        self._bias = _columns(sampling.logit_bias)
        self._stops = _columns(dict.fromkeys(stop_ids, BAN)) if sampling.min_tokens else None
        edits = (self._seen, self._said, self._bias, self._stops, guide)
        self.is_greedy = sampling.temperature == 0
        self.is_plain = self.is_greedy and all(each is None for each in edits)
        """Whether one argmax of the bare logits will do."""

    def uniform(self) -> float:
        """The sequence's next random number, from [0, 1); asked for once a token."""
        return self._random.random()

    def push(self, id_: int) -> None:
        """The token that was drawn."""
        self._pushed += 1
        if self.guide is not None:
            self.guide.push(id_)
        for counts in (self._seen, self._said):
            if counts is not None:
                counts.push(id_)

    @property
    def seen(self) -> Ids | None:
        """Ids of prompt and continuation, each once, where they are to be weakened."""
        return None if self._seen is None else self._seen.ids

    def additions(self) -> list[tuple[Ids, Amounts]]:
        """What is to be added to which logits."""
        found = [] if self._bias is None else [self._bias]
        if self._stops is not None and self._pushed < self.sampling.min_tokens:
            found.append(self._stops)
        if self._said is not None:
            counts = self._said.counts
            weight = self.sampling.presence_penalty + self.sampling.frequency_penalty * counts
            found.append((self._said.ids, -weight.astype(np.float32)))
        return found


def _columns(amounts: dict[int, float]) -> tuple[Ids, Amounts] | None:
    if not amounts:
        return None
    ids = np.fromiter(amounts, np.int64, len(amounts))
    return ids, np.fromiter(amounts.values(), np.float32, len(amounts))

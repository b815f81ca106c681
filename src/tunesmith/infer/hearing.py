"""What the engine says of given rows, on the caller's thread: its own forward, cache and sampler.

T tokens of a chunk, V vocabulary.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from tunesmith.errors import ServerError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.engine import Engine
from tunesmith.infer.model import ServedModel
from tunesmith.infer.precision import Precision
from tunesmith.infer.runner import Runner
from tunesmith.infer.scheduler import Limits
from tunesmith.infer.sequence import Sequence, Token
from tunesmith.spec.chat import Sampling

_BLOCK_TOKENS = 64
_ADAPTER = "heard"


@dataclass
class Reading:
    """Log-probabilities of a row's ids but the first, as its prompt is read; and by how much the
    likeliest id of each place is likelier than the next."""

    ids: list[int]
    log_probs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    kind: Literal["logits", "hidden"] = "logits"

    def read(self, start: int, rows: Tensor) -> None:
        next_T = self.ids[start + 1 : start + 1 + rows.shape[0]]
        if not next_T:
            return
        own_TV = rows[: len(next_T)].float().log_softmax(dim=-1)
        place_T = own_TV.new_tensor(next_T).long()
        best_T2 = own_TV.topk(2, dim=-1).values
        del self.log_probs[start:], self.margins[start:]
        self.log_probs += own_TV.gather(1, place_T[:, None])[:, 0].tolist()
        self.margins += (best_T2[:, 0] - best_T2[:, 1]).tolist()


@dataclass(frozen=True)
class Heard:
    log_probs: list[list[float]]
    answers: list[list[int]]
    margins: list[list[float]] = field(default_factory=list)
    """Of the rows; empty where nobody asks."""


class Ears:
    """A base, and one adapter at a time that stands on it."""

    def __init__(self, base: Path, device: str = "cpu", precision: Precision = "fp32") -> None:
        """Raises BadRequestError where the engine cannot serve it."""
        self.base = base
        self._model = ServedModel(base, device, precision)
        self._runner = Runner(self._model)

    @property
    def format(self) -> str:
        """As the weights are held."""
        return self._model.shape.precision

    @property
    def is_lean(self) -> bool:
        return self._model.is_lean

    @property
    def context_length(self) -> int:
        return self._model.shape.context_length

    @contextmanager
    def loaded(self, folder: Path) -> Iterator[str | None]:
        """The name of the adapter in a folder; None where that is the base itself."""
        if not is_adapter(folder):
            yield None
            return
        self._model.adapters.load(_ADAPTER, folder)
        try:
            yield _ADAPTER
        finally:
            self._model.adapters.retire(_ADAPTER)
            self._model.adapters.sweep(set())

    def hear(
        self, adapter: str | None, rows: Many[list[int]], questions: Many[list[int]], most: int
    ) -> Heard:
        return hear(self._runner, adapter, rows, questions, most)


def hear(
    runner: Runner,
    adapter: str | None,
    rows: Many[list[int]],
    questions: Many[list[int]],
    most: int,
) -> Heard:
    """Read `rows`, and answer `questions` with the likeliest `most` tokens, all in one batch.

    `adapter` is a name that was loaded. Raises ServerError where weights are no numbers.
    """
    longest = max(map(len, [*rows, *questions])) + most
    count = len(rows) + len(questions)
    blocks = count * -(-longest // _BLOCK_TOKENS)
    limits = Limits(running=count, waiting=count, block_tokens=_BLOCK_TOKENS, blocks=blocks, kept=0)
    engine = Engine(runner, limits)
    key = None if adapter is None else runner.model.adapters.key(adapter)
    readings = [Reading(ids) for ids in rows]
    faults: list[Exception] = []

    def note(said: Token | Exception) -> None:
        if isinstance(said, Exception):
            faults.append(said)

    reading = [
        Sequence(one.ids, Sampling(max_tokens=0), note, adapter=key, reader=one) for one in readings
    ]
    greedy = Sampling(max_tokens=most, temperature=0)
    answering = [Sequence(ids, greedy, note, adapter=key) for ids in questions]
    engine.run([*reading, *answering])
    if faults:
        raise ServerError(f"the engine could not answer: {faults[0]}")
    return Heard(
        [one.log_probs for one in readings],
        [one.generated for one in answering],
        [one.margins for one in readings],
    )

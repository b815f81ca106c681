"""One continuation under way inside the engine, and the tokens that come out of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Literal, Protocol

from tunesmith.infer.draw import Draw
from tunesmith.infer.guide import Guide
from tunesmith.spec.chat import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.infer.sampler import Score

Finish = Literal["stop", "length"]


class Reader(Protocol):
    """Takes what the model makes of a prompt, a chunk at a time, on the engine's thread."""

    kind: Literal["logits", "hidden"]
    """Logits (T, V), or the last hidden states (T, D), which no token is sampled from."""

    def read(self, start: int, rows: "Tensor") -> None:
        """The rows at positions `start` and after; again from 0 after an eviction. Rows past the
        prompt may be among them."""


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled id of the `index`-th sequence of a request."""

    index: int
    id: int | None
    """None where nothing was to be sampled: the prompt has been read."""
    finish: Finish | None = None
    """Set on a sequence's last token only."""
    is_end: bool = False
    """The id itself is a stop token: it has no text."""
    score: "Score | None" = None
    """Where log-probabilities were asked for."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what has been sampled after it.

    Only the engine's thread touches it, but for `is_cancelled`, which anyone may set.
    """

    prompt: list[int]
    sampling: Sampling
    emit: Callable[[Token | Exception], None]
    """Called on the engine's thread with each token, or once with what went wrong."""
    index: int = 0
    adapter: int | None = None
    """The engine's own number of it, not its public name."""
    stop_ids: frozenset[int] = frozenset()
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    reused: int = 0
    """Leading tokens that were taken from another's cache."""
    blocks: int = 0
    """Cache blocks that the scheduler has promised to it."""
    reader: Reader | None = None
    """Wants all rows of the prompt: no part of it may come from another's cache."""
    random: Random = field(default_factory=Random)
    """Its own numbers: they outlive an eviction and owe nothing to its neighbours."""
    guide: Guide | None = None
    draw: Draw = field(init=False)
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.draw = Draw(self.sampling, self.prompt, self.stop_ids, self.random, self.guide)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def pending(self) -> int:
        """Tokens that must still go through the model before the next one can be sampled."""
        return self.length - self.computed

    def wants_rows(self, start: int) -> bool:
        """Whether a chunk that begins at `start` is wanted row by row."""
        return self.reader is not None and start < len(self.prompt)

    def tokens(self, start: int, end: int) -> list[int]:
        """The ids of positions `start` to `end`, across prompt and continuation."""
        cut = len(self.prompt)
        if end <= cut:
            return self.prompt[start:end]
        return self.prompt[start:cut] + self.generated[max(start - cut, 0) : end - cut]

"""Which samples a step is made of, in which order they come, and in which passes they run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

_ROUNDS = 6


class Sized(Protocol):
    """What a step is made of."""

    @property
    def tokens(self) -> int:
        """That a pass over it holds."""

    @property
    def labels(self) -> int:
        """Tokens that are predicted."""


S = TypeVar("S", bound=Sized)
S_co = TypeVar("S_co", bound=Sized, covariant=True)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of tokens. `mask[i]` says that token i is a label; `labels` counts them from 1 on."""

    ids: Sequence[int]
    mask: Sequence[bool]
    labels: int

    @classmethod
    def of(cls, ids: Sequence[int], mask: Sequence[bool]) -> "Sample":
        return cls(ids, mask, sum(mask[1:]))

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Shuffle:
    """A permutation of 0 … count-1 drawn from (seed, epoch), computed place by place.

    A balanced Feistel network over the next power of four, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): no array is kept, any place
    can be asked for, and no library's next version changes the order.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self._count = count
        self._half_bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        digest = blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8]) for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._count:
            raise IndexError(place)
        place = self._scramble(place)
        while place >= self._count:
            place = self._scramble(place)
        return place

    def __iter__(self) -> Iterator[int]:
        return (self[place] for place in range(self._count))

    def _scramble(self, number: int) -> int:
        bits = self._half_bits
        mask = (1 << bits) - 1
        left, right = number >> bits, number & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << bits | right


def _mix(number: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    number &= 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31


class Interrupted(Exception):
    """A stop was asked for while looking for a sample."""


class Source(Protocol[S_co]):
    """The samples of one epoch after another, each read when it is asked for."""

    def open(self, epoch: int, position: dict[str, Any] | None = None) -> None:
        """Go to an epoch's beginning, where the first starts to count anew, or to a `position`."""

    def position(self) -> dict[str, Any]:
        """Where the next `pull` reads, and what was counted before it, in JSON's types."""

    def pull(self) -> S_co | None:
        """The next sample; None at the end of the epoch."""

    def expected(self) -> float:
        """Samples in an epoch, an estimate from what was seen so far. Above 0."""

    def lines(self, epoch: int, start: dict[str, Any], end: dict[str, Any] | None) -> list[int]:
        """Of the file, what was pulled from one `position` to another, or to the epoch's end."""

    def nothing_usable(self) -> Exception:
        """What to raise where a whole epoch held no sample."""


class Feed(Generic[S]):
    """Deals out the samples of each step. A step never reaches over the end of an epoch.

    One sample is read ahead, so that the end of an epoch is known with its last step.
    """

    def __init__(self, source: Source[S], samples_a_step: int) -> None:
        self.epoch = 0
        self.epoch_samples: int | None = None
        """Exact, once the first epoch has ended."""
        self._source = source
        self.samples_a_step = samples_a_step
        self._taken = 0
        self._open(None)

    def take(self) -> list[S]:
        """The samples of the next step, at least one. Raises what the source says is wrong."""
        if not self._is_ahead:
            self._read_ahead()
            if self._ahead is None:
                raise self._source.nothing_usable()
        samples: list[S] = []
        while self._ahead is not None and len(samples) < self.samples_a_step:
            samples.append(self._ahead)
            self._taken += 1
            self._read_ahead()
        if self._ahead is None:
            self._end_epoch()
        return samples

    def lines(self, since: Mapping[str, Any]) -> list[int]:
        """See `Steps`."""
        end = self._position if self.epoch == since["epoch"] else None
        return self._source.lines(since["epoch"], since["source"], end)

    def lay_anew(self, samples: Sequence[S]) -> Sequence[S]:
        """See `Steps`: a sample of a source is never cut."""
        return samples

    @property
    def is_between_epochs(self) -> bool:
        return self._taken == 0

    @property
    def progress(self) -> float:
        """Epochs done, with the share of the one under way."""
        return self.epoch + min(self._taken / self.samples_an_epoch, 1.0)

    @property
    def samples_an_epoch(self) -> float:
        """An estimate in the first epoch."""
        return self.epoch_samples or self._source.expected()

    @property
    def steps_an_epoch(self) -> int:
        return max(1, math.ceil(round(self.samples_an_epoch, 6) / self.samples_a_step))

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "taken": self._taken,
            "epoch_samples": self.epoch_samples,
            "source": self._position,
        }

    @property
    def told(self) -> Mapping[str, float]:
        return {}

    def kept(self) -> Mapping[str, Any]:
        return {}

    def seek(self, state: dict[str, Any], kept: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.epoch, self._taken = state["epoch"], state["taken"]
        self.epoch_samples = state["epoch_samples"]
        self._open(state["source"])
        if self._taken:
            self._read_ahead()

    def _open(self, position: dict[str, Any] | None) -> None:
        self._source.open(self.epoch, position)
        self._ahead: S | None = None
        self._is_ahead = False
        self._position = self._source.position()

    def _read_ahead(self) -> None:
        self._position = self._source.position()
        self._ahead = self._source.pull()
        self._is_ahead = True

    def _end_epoch(self) -> None:
        self.epoch_samples = self._taken
        self._taken = 0
        self.epoch += 1
        self._open(None)


def split(samples: Sequence[S], budget_tokens: int) -> list[list[S]]:
    """Share out a step's samples to passes of at most `budget_tokens`, the shortest first.

    Neighbours in length share a pass; a sample over the budget has one to itself. How a step is
    split changes its speed and memory, not its update.
    """
    passes: list[list[S]] = []
    room = 0
    for sample in sorted(samples, key=lambda sample: sample.tokens):
        if not passes or sample.tokens > room:
            passes.append([])
            room = budget_tokens
        passes[-1].append(sample)
        room -= sample.tokens
    return passes

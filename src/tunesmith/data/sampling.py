"""Some of a corpus's documents, each as often as its metadata weigh it.

What is held is 10 bytes for each document that is chosen, and 8 more while an epoch is read.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import floor
from typing import Any

from tunesmith.data.holdout import Rows
from tunesmith.data.row import Format, Row
from tunesmith.data.rows import RowIndex
from tunesmith.errors import ValidationError
from tunesmith.spec.sampling import Sampling, Value

_SHOWN = 20
"""Fields, or values, that a refusal names."""
_SCALE = 1 << 64


@dataclass(frozen=True)
class Chosen:
    """Rows of a file in the file's order, with weights."""

    index: RowIndex
    places: "array[int]"
    shares: "array[int]"
    """Of each its place in `weights`."""
    weights: tuple[float, ...]
    left_out: int
    """Rows of the file that no epoch reads."""

    @property
    def format(self) -> Format:
        return self.index.format

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> Row:
        return self.index[self.places[at]]

    def size(self, at: int) -> int:
        return self.index.size(self.places[at])

    def body(self, at: int) -> bytes:
        return self.index.body(self.places[at])

    def within(self, some: Sequence[int]) -> "Chosen":
        """Only those at these of its places."""
        return Chosen(
            self.index,
            array("Q", (self.places[at] for at in some)),
            array("H", (self.shares[at] for at in some)),
            self.weights,
            self.left_out,
        )

    def draw(self, seed: int, epoch: int) -> "Draw":
        """The documents of an epoch. How often one is drawn depends on nothing but its place in the
        file, its weight, the seed and the epoch."""
        ends, total = array("Q"), 0
        for place, share in zip(self.places, self.shares, strict=True):
            total += _times(self.weights[share], seed, epoch, place)
            ends.append(total)
        return Draw(self, ends)

    @property
    def sentence(self) -> str:
        documents = sum(self.weights[share] for share in self.shares)
        return (
            f"sampling leaves out {self.left_out:,} of {len(self.index):,} documents; "
            f"an epoch reads about {documents:,.0f}"
        )


@dataclass(frozen=True)
class Draw:
    """An epoch's documents, some of them several times: rows that can be looked at in any order."""

    rows: Chosen
    ends: "array[int]"
    """Of each row the number of documents up to and with it."""

    @property
    def format(self) -> Format:
        return self.rows.format

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, at: int) -> int:
        """Which of the rows."""
        return bisect_right(self.ends, at)

    def __getitem__(self, at: int) -> Row:
        return self.rows[self.place(at)]

    def size(self, at: int) -> int:
        return self.rows.size(self.place(at))


@dataclass
class _Seen:
    """What a field was found to hold."""

    rows: int = 0
    values: dict[str, None] = field(default_factory=dict)

    def add(self, words: Iterable[str]) -> None:
        self.rows += 1
        for word in words:
            if len(self.values) < _SHOWN:
                self.values[word[:40]] = None


def choose(index: RowIndex, sampling: Sampling) -> Chosen:
    """Look at every row's metadata once. Raises ValidationError where no row has what is asked for:
    the field, one of the values, a weight above 0."""
    wanted = {name: set(map(_word, values)) for name, values in sampling.where.items()}
    told = sampling.weights
    weights = (told.default, *told.values.values()) if told else (1.0,)
    shares = {word: at for at, word in enumerate(told.values, 1)} if told else {}
    seen = {name: _Seen() for name in [*wanted, *([told.field] if told else [])]}
    fields: dict[str, None] = {}
    places, picked = array("Q"), array("H")
    for at in range(len(index)):
        found = index.metadata(at)
        _note(found, fields, seen)
        if not all(values & set(_words(found.get(name))) for name, values in wanted.items()):
            continue
        own = (
            [shares[word] for word in _words(found.get(told.field)) if word in shares]
            if told
            else []
        )
        share = max(own, key=lambda one: weights[one], default=0)
        if weights[share]:
            places.append(at)
            picked.append(share)
    _refuse_unknown(len(index), fields, seen)
    if not places:
        raise _none_left(sampling, seen)
    return Chosen(index, places, picked, tuple(weights), len(index) - len(places))


def sampled(index: RowIndex, sampling: Sampling | None, seed: int) -> Rows:
    """What the first epoch reads: all rows, or those that are drawn. Raises ValidationError where
    that is none."""
    if sampling is None:
        return index
    drawn = choose(index, sampling).draw(seed, 0)
    if not drawn:
        raise ValidationError(
            "sampling draws no document in the first epoch: its weights are too small for so few",
            param="sampling",
        )
    return drawn


def _times(weight: float, seed: int, epoch: int, place: int) -> int:
    whole = floor(weight)
    if weight == whole:
        return whole
    digest = blake2b(f"{seed}/{epoch}/{place}".encode(), digest_size=8).digest()
    return whole + (int.from_bytes(digest, "big") < (weight - whole) * _SCALE)


def _note(found: Mapping[str, Any], fields: dict[str, None], seen: Mapping[str, _Seen]) -> None:
    if len(fields) < _SHOWN:
        fields.update(dict.fromkeys(name[:40] for name in list(found)[:_SHOWN]))
    for name, one in seen.items():
        if name in found:
            one.add(_words(found[name]))


def _refuse_unknown(rows: int, fields: Iterable[str], seen: Mapping[str, _Seen]) -> None:
    missing = next((name for name, one in seen.items() if not one.rows), None)
    if missing is None:
        return
    known = ", ".join(map(repr, fields))
    there = f"its fields are {known}" if known else 'rows need one: {"text": …, "metadata": {…}}'
    raise ValidationError(
        f"sampling: none of {rows:,} rows has {missing[:80]!r} in its metadata; {there}",
        param="sampling",
    )


def _none_left(sampling: Sampling, seen: Mapping[str, _Seen]) -> ValidationError:
    there = "; ".join(
        f"{name[:80]!r} is {', '.join(map(repr, seen[name].values))}" for name in seen
    )
    return ValidationError(
        f"sampling leaves no document: in the metadata {there}"[:2000], param="sampling"
    )


def _words(value: Any) -> Iterator[str]:
    """What a value is compared as; a list is each of its values, an object nothing."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str | int | float):
            yield _word(one)


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)

"""A share of the rows kept back from training, to be judged by: the same for the same seed."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from tunesmith.data.row import Format, Row
from tunesmith.errors import ValidationError


class Rows(Protocol):
    """Rows that can be read one at random: of a file, or a part of one."""

    @property
    def format(self) -> Format: ...

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> Row: ...

    def size(self, at: int) -> int: ...


@dataclass(frozen=True)
class Part:
    """Some of a file's rows, in the file's order; 8 bytes are held for each."""

    index: Rows
    places: "array[int]"

    @property
    def format(self) -> Format:
        return self.index.format

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> Row:
        return self.index[self.places[at]]

    def size(self, at: int) -> int:
        return self.index.size(self.places[at])


class Bodies(Protocol):
    """Rows as they stand in a file."""

    @property
    def format(self) -> Format: ...

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> Row: ...

    def size(self, at: int) -> int: ...

    def body(self, at: int) -> bytes: ...


def hold_out(index: Bodies, share: float, seed: int) -> tuple[Part, Part]:
    """What is trained on, and what is held out: `share` of the rows, at least one, never all.

    A row is drawn by a hash of the seed and its bytes, so that those that read alike fall to one
    side: then a few more than `share` may be held out. Raises ValidationError where no row would
    be left.
    """
    hashes = array("Q", (_draw(seed, index.body(at)) for at in range(len(index))))
    wanted = max(1, round(share * len(hashes)))
    limit = sorted(hashes)[wanted - 1] if hashes else 0
    held = Part(index, array("Q", _where(hashes, limit, is_held=True)))
    rest = Part(index, array("Q", _where(hashes, limit, is_held=False)))
    if not len(rest):
        raise ValidationError(
            f"of {len(index)} rows none is left to train on, once {wanted} and all that read alike "
            "are held out; give more rows, or an eval_dataset",
            param="holdout",
        )
    return rest, held


def _draw(seed: int, body: bytes) -> int:
    digest = blake2b(body, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big")


def _where(hashes: "array[int]", limit: int, *, is_held: bool) -> Iterable[int]:
    return (at for at, drawn in enumerate(hashes) if (drawn <= limit) == is_held)

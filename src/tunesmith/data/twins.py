"""Rows that say the same: exact, by a hash of what they say, in memory that does not grow.

What is kept of a row is 64 bits of BLAKE2b and its number. They are parted by the hash's first
bits into buckets that overflow to a file, and a bucket is looked at alone, so that a file of a
hundred million rows wants some 40 MB. Two rows that differ are taken for one with probability
n² / 2^65: one in a million for six million rows.
"""

import heapq
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from pydantic import BaseModel

from tunesmith.data.row import Row
from tunesmith.data.scratch import scratch
from tunesmith.spec.strict import Strict

SHOWN = 20
_BUCKETS, _SHIFT = 256, 56
_BLOCK = 1024
"""Numbers that a bucket holds before they go to the file: two of each row."""
_PARTS = tuple(field.name for field in fields(Row) if field.name != "line")


class Twin(Strict):
    """A row that says what another one says, both by line."""

    line: int
    first: int
    """Of the other one."""


class Twins(Strict):
    count: int = 0
    first: tuple[Twin, ...] = ()
    """By line, at most `SHOWN` of them."""

    def sentence(self, what: str) -> str:
        """`3 rows <what> (line 7 as line 3, line 9 as line 3, …)`; empty where there are none."""
        if not self.count:
            return ""
        shown = [f"line {twin.line} as line {twin.first}" for twin in self.first[:5]]
        more = ", …" if self.count > len(shown) else ""
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count:,} {rows} {what} ({', '.join(shown)}{more})"


class Prints:
    """Fingerprints of a file's rows, in the order of the file."""

    def __init__(self, near: Path) -> None:
        self._near = near
        self._file: BinaryIO | None = None
        self._end = 0
        self._held = [array("Q") for _ in range(_BUCKETS)]
        self._away: list[list[int]] = [[] for _ in range(_BUCKETS)]

    def add(self, row: Row) -> None:
        number = fingerprint(row)
        held = self._held[number >> _SHIFT]
        held.append(number)
        held.append(row.line)
        if len(held) >= _BLOCK:
            self._put_away(number >> _SHIFT)

    def bucket(self, at: int) -> Iterator[tuple[int, int]]:
        """Fingerprint and line of its rows."""
        for offset in self._away[at]:
            assert self._file is not None
            self._file.seek(offset)
            numbers = array("Q", self._file.read(8 * _BLOCK))
            yield from zip(numbers[::2], numbers[1::2], strict=True)
        held = self._held[at]
        yield from zip(held[::2], held[1::2], strict=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Prints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put_away(self, at: int) -> None:
        if self._file is None:
            self._file = scratch(self._near)
        self._file.seek(self._end)
        self._file.write(self._held[at].tobytes())
        self._away[at].append(self._end)
        self._end += 8 * _BLOCK
        self._held[at] = array("Q")


def repeats(prints: Prints) -> Twins:
    """Rows that an earlier row of the file says as well."""

    def found() -> Iterator[tuple[int, int]]:
        for at in range(_BUCKETS):
            seen: dict[int, int] = {}
            for number, line in prints.bucket(at):
                first = seen.setdefault(number, line)
                if first != line:
                    yield line, first

    return _twins(found())


def shared(training: Prints, validation: Prints) -> Twins:
    """Rows of the second file that stand in the first as well: `line` is the second's."""

    def found() -> Iterator[tuple[int, int]]:
        for at in range(_BUCKETS):
            seen: dict[int, int] = {}
            for number, line in training.bucket(at):
                seen.setdefault(number, line)
            for number, line in validation.bucket(at):
                if number in seen:
                    yield line, seen[number]

    return _twins(found())


def fingerprint(row: Row) -> int:
    """Of all that a row says, whatever format or file it stood in."""
    body = msgspec.json.encode(_said(row), enc_hook=_plain)
    return int.from_bytes(blake2b(body, digest_size=8).digest())


def _said(row: Row) -> list[Any]:
    """But for where it stood; a pair's other answer is a row of its own."""
    parts = [getattr(row, name) for name in _PARTS]
    return [_said(part) if isinstance(part, Row) else part for part in parts]


def _plain(value: Any) -> Any:
    assert isinstance(value, BaseModel)
    return list(value.__dict__.values())


def _twins(found: Iterable[tuple[int, int]]) -> Twins:
    count, first = 0, list[tuple[int, int]]()
    for line, other in found:
        count += 1
        heapq.heappush(first, (-line, other))
        if len(first) > SHOWN:
            heapq.heappop(first)
    lines = sorted((-line, other) for line, other in first)
    return Twins(count=count, first=tuple(Twin(line=line, first=other) for line, other in lines))

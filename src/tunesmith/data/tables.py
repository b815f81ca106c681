"""CSV: where each record stands, and what its cells say under the names of the first line.

Quoted cells may hold newlines, so a record is as many lines as its quotes make it; the `csv`
module of Python decides, once to part the records and once to read one.
"""

import contextlib
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tunesmith.data.row import RowFault, Wrong
from tunesmith.data.scan import BOM, MAX_ROW, Span

MAX_COLUMNS = 4096
_DELIMITERS = ",;\t"
csv.field_size_limit(MAX_ROW)


@dataclass(frozen=True)
class Head:
    """The first record: the names of the columns; an empty one names none."""

    names: tuple[str, ...]
    delimiter: str
    end: int
    """Offset of the record after it."""
    lines: int


def read_head(file: BinaryIO, suffix: str) -> Head:
    """Raises RowFault: not text, a name that is given twice, too many columns."""
    lines = _Lines(file, 0, 0)
    body = b""
    while not body.strip():
        lines.forget()
        with contextlib.suppress(csv.Error):  # told once the names are read
            next(csv.reader(_Tolerant(lines)), None)
        body = b"".join(lines.held)
        if not body:
            return Head((), ",", lines.offset, lines.number)
    try:
        return _head(body, lines, suffix)
    except Wrong as wrong:
        raise RowFault(lines.first, wrong.reason) from None


def _head(body: bytes, lines: "_Lines", suffix: str) -> Head:
    if b"\0" in body:
        raise Wrong("there is a NUL byte; the file may be UTF-16, save it as UTF-8")
    text = _decoded(body.removeprefix(BOM))
    delimiter = "\t" if suffix == ".tsv" else _delimiter(text)
    names = [name.strip() for name in _cells(text, delimiter)]
    if len(names) > MAX_COLUMNS:
        raise Wrong(f"{len(names):,} columns; {MAX_COLUMNS:,} is the limit")
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise Wrong(f"the column {twice[:80]!r} is there twice; rename one")
    return Head(tuple(names), delimiter, lines.offset, lines.number)


def records(file: BinaryIO, head: Head) -> Iterator[Span]:
    """Each record after the head, as it stands in the file. Raises RowFault for an endless one."""
    lines = _Lines(file, head.end, head.lines)
    reader = csv.reader(lines, delimiter=head.delimiter, strict=True)
    while True:
        lines.forget()
        try:
            next(reader)
        except StopIteration:
            return
        except csv.Error:
            pass  # told once the record's cells are read
        body = b"".join(lines.held)
        if not body:
            return
        if not body.isspace():
            yield Span(lines.first, lines.offset - len(body), body)


def cells(body: bytes, head: Head) -> dict[str, str]:
    """What a record says. Raises Wrong."""
    found = _cells(_decoded(body), head.delimiter)
    if len(found) != len(head.names):
        raise Wrong(
            f"{len(found)} cells, where the first line names {len(head.names)} columns; put a cell "
            f"that holds {head.delimiter!r} or a newline in double quotes"
        )
    return {name: cell for name, cell in zip(head.names, found, strict=True) if name}


def _cells(text: str, delimiter: str) -> list[str]:
    try:
        found = list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise Wrong(
            f"not CSV ({error}); a quote inside a quoted cell is written twice, and lines end "
            "with a line feed"
        ) from None
    return found[0] if found else []


def _decoded(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise Wrong(
            f"not valid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"
        ) from None


def _delimiter(text: str) -> str:
    """What parts the names in the first line: the most frequent of those in use."""
    unquoted = "".join(text.split('"')[::2])
    return max(_DELIMITERS, key=lambda sign: (unquoted.count(sign), -_DELIMITERS.index(sign)))


class _Lines:
    """A file's lines as text for the csv module; remembers those since `forget`."""

    def __init__(self, file: BinaryIO, offset: int, number: int) -> None:
        self._file, self.offset, self.number = file, offset, number
        file.seek(offset)
        self.forget()

    def forget(self) -> None:
        self.held: list[bytes] = []
        self._size = 0
        self.first = self.number + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW + 1)
        if not line:
            raise StopIteration
        self._size += len(line)
        if self._size > MAX_ROW:
            raise RowFault(
                self.first, f"longer than {MAX_ROW >> 20} MB; is a quote opened and never closed?"
            )
        self.held.append(line)
        self.offset += len(line)
        self.number += 1
        return line.decode("utf-8", "surrogateescape")


class _Tolerant:
    """For the head, whose delimiter is not known yet: only its quotes count."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    def __iter__(self) -> "_Tolerant":
        return self

    def __next__(self) -> str:
        return next(self._lines).removeprefix("\ufeff").replace(";", ",").replace("\t", ",")

"""Where each row of a file stands, found in one pass that holds a piece of the file at a time.

Layouts: a JSON object a line, one JSON array of objects, plain text with blank lines between
documents; and the tables that `tables` and `parquet` read. Only the structure is looked at; what
is in a row is for `formats`.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from tunesmith.data.row import RowFault
from tunesmith.errors import BadRequestError, NotFoundError

Layout = Literal["lines", "array", "documents", "csv", "parquet"]
MAX_ROW = 64 << 20
"""Bytes of one row."""
BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_BY_SUFFIX: dict[str, Layout] = {
    ".txt": "documents",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_BLANK = b" \t\r\n"
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_SCALAR = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s,\[\]{}"]+', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of one row. `line` counts from 1 (see `row.Row`)."""

    line: int
    offset: int
    body: bytes


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises NotFoundError, or BadRequestError where it is no file.

    A pipe or a device is refused before a read could hang on it; a link is refused because it
    may point out of the workspace, so that callers resolve paths first.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"no such data set: {path.name}") from None
    except OSError as error:
        raise BadRequestError(
            f"{path.name} cannot be read ({error.strerror}); a data set must be a regular file"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadRequestError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def layout_of(file: BinaryIO, suffix: str) -> Layout:
    """How the rows stand in a file: by its suffix, else by its first bytes. Rewinds the file."""
    file.seek(0)
    head = b""
    while not head and (chunk := file.read(4096)):
        head = chunk.removeprefix(BOM).lstrip(_BLANK)
    file.seek(0)
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:1] == b"[":
        return "array"
    if head[:1] == b"{" or suffix in {".json", ".jsonl"} or not head:
        return "lines"
    return "documents"


def spans(file: BinaryIO, layout: Layout) -> Iterator[Span]:
    """The rows of a file from its start. Raises RowFault where its structure breaks off."""
    file.seek(0)
    if layout == "lines":
        return _lines(file)
    if layout == "documents":
        return _documents(file)
    return _elements(file)


def _numbered(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    offset, number = 0, 0
    if file.read(len(BOM)) == BOM:
        offset = len(BOM)
    file.seek(offset)
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise RowFault(number, f"longer than {MAX_ROW >> 20} MB; split the file into lines")
        yield number, offset, line
        offset += len(line)


def _lines(file: BinaryIO) -> Iterator[Span]:
    for number, offset, line in _numbered(file):
        if line.isspace():
            continue
        yield Span(number, offset, line)


def _documents(file: BinaryIO) -> Iterator[Span]:
    held: list[bytes] = []
    start, first, size = 0, 1, 0
    for number, offset, line in _numbered(file):
        if line.isspace():
            if held:
                yield Span(first, start, b"".join(held))
            held, size = [], 0
            continue
        if not held:
            start, first = offset, number
        held.append(line)
        size += len(line)
        if size > MAX_ROW:
            raise RowFault(first, f"a document over {MAX_ROW >> 20} MB; part it by blank lines")
    if held:
        yield Span(first, start, b"".join(held))


class _Window:
    """A piece of the file that grows to hold the element under way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.body, self.offset, self.at = file, b"", 0, 0
        if self.more() and self.body.startswith(BOM):
            self.at = len(BOM)

    def more(self) -> bool:
        """Drop what is done with and read on; at least doubles what is held."""
        chunk = self.file.read(max(_CHUNK, len(self.body) - self.at))
        self.body = self.body[self.at :] + chunk
        self.offset += self.at
        self.at = 0
        return bool(chunk)

    def peek(self) -> bytes:
        """The next byte that is not blank, empty at the end of the file."""
        while True:
            found = _SPACE.match(self.body, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.body):
                return self.body[self.at : self.at + 1]
            if not self.more():
                return b""


def _elements(file: BinaryIO) -> Iterator[Span]:
    window, number = _Window(file), 0
    window.peek()
    window.at += 1
    if window.peek() == b"]":
        window.at += 1
    else:
        while True:
            number += 1
            yield _element(window, number)
            mark = window.peek()
            window.at += 1
            if mark == b"]":
                break
            if mark != b",":
                raise _broken(number, "a comma or the end of the array must follow")
    if window.peek():
        raise _broken(number, "there is more after the end of the array")


def _element(window: _Window, number: int) -> Span:
    is_nested = window.peek() in {b"{", b"["}
    while True:
        end = _nested_end(window) if is_nested else _scalar_end(window)
        if end - window.at > MAX_ROW or (not end and len(window.body) - window.at > MAX_ROW):
            raise _broken(number, f"longer than {MAX_ROW >> 20} MB")
        if end:
            break
        if not window.more():
            end = 0 if is_nested else _scalar_end(window, is_all=True)
            if end:
                break
            raise _broken(number, "the file ends inside this row, or a row is missing")
    span = Span(number, window.offset + window.at, window.body[window.at : end])
    window.at = end
    return span


def _nested_end(window: _Window) -> int:
    depth = 0
    for found in _TOKEN.finditer(window.body, window.at):
        mark = window.body[found.start()]
        if mark in b"{[":
            depth += 1
        elif mark in b"}]":
            depth -= 1
            if depth == 0:
                return found.end()
        elif found.end() - found.start() == 1:
            break  # a string that goes on after what is held
    return 0


def _scalar_end(window: _Window, is_all: bool = False) -> int:
    found = _SCALAR.match(window.body, window.at)
    if not found or (found.end() == len(window.body) and not is_all):
        return 0
    return found.end()


def _broken(number: int, reason: str) -> RowFault:
    return RowFault(number, f"not a JSON array: {reason}", unit="row")

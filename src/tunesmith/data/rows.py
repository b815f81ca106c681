"""Rows of a data file: read one at random without holding the file, or check them all."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from tunesmith.data import formats, scan
from tunesmith.data.formats import Format, Row, RowFault, Wrong
from tunesmith.data.scan import Layout, Span
from tunesmith.spec.strict import Sha256, Strict

__all__ = ["Fault", "FileReport", "Row", "RowFault", "RowIndex", "check_file"]

_SAMPLE = 20
"""Rows looked at to find the format."""
_BLOCK = 1 << 20


class Fault(Strict):
    line: int
    """From 1; 0 is the file as a whole."""
    loc: str = Field("", max_length=1000)
    """Where in the row."""
    msg: str
    unit: str = "line"
    """`row` where the file is an array, since rows are counted there."""


class FileReport(Strict):
    """What a file holds, and what is wrong with it (`faults`: the first ones, by line)."""

    format: Format | None
    num_samples: int
    size: int
    """Bytes."""
    sha256: Sha256
    faults: tuple[Fault, ...] = ()
    fault_count: int = 0
    ignored_fields: tuple[str, ...] = ()
    """Columns that are there but mean nothing to us."""

    @property
    def is_usable(self) -> bool:
        return self.fault_count == 0


class RowIndex:
    """Random access to the rows of a file; only where they stand is held, 24 bytes a row.

    Survives a fork, and may be read from several threads.
    """

    _descriptor = -1

    def __init__(self, file: BinaryIO, layout: Layout, format: Format) -> None:
        self._descriptor, self._layout = os.dup(file.fileno()), layout
        self.format: Format = format
        self._offsets, self._sizes, self._lines = array("Q"), array("L"), array("Q")
        for span in scan.spans(file, layout):
            self._offsets.append(span.offset)
            self._sizes.append(len(span.body))
            self._lines.append(span.line)

    @classmethod
    def open(cls, path: Path | str) -> "RowIndex":
        """Find every row. Raises NotFoundError, BadRequestError, or RowFault (broken structure,
        no row, no known format in the first rows).
        """
        path = Path(path)
        with scan.open_regular(path) as file:
            layout = scan.layout_of(file, path.suffix.lower())
            return cls(file, layout, _format_of(file, layout))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, at: int) -> Row:
        """Raises RowFault, and IndexError outside the file."""
        line = self._lines[at]
        return _row(Span(line, self._offsets[at], self.body(at)), self._layout, self.format)

    def __iter__(self) -> Iterator[Row]:
        for at in range(len(self)):
            yield self[at]

    def body(self, at: int) -> bytes:
        """A row as it stands in the file."""
        return os.pread(self._descriptor, self._sizes[at], self._offsets[at])

    def line(self, at: int) -> int:
        return self._lines[at]

    def size(self, at: int) -> int:
        """Bytes of a row: no text in it is longer, in UTF-8, than that."""
        return self._sizes[at]

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> "RowIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_file(
    path: Path | str,
    *,
    name: str | None = None,
    max_faults: int = 20,
    on_progress: Callable[[int, int], None] | None = None,
) -> FileReport:
    """Read a whole file and check each row, in constant memory.

    `name` is what the file was called, where `path` is a temporary name; its suffix counts.
    `on_progress` is told bytes done and bytes in all, about once a megabyte. Raises NotFoundError
    and BadRequestError for what is no file; everything else is a fault in the report.
    """
    path = Path(path)
    with scan.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        layout = scan.layout_of(file, Path(name or path).suffix.lower())
        checker = _Checker(layout, max_faults)
        checker.run(file, size, on_progress)
        return checker.report(size, _digest(file))


class _Checker:
    def __init__(self, layout: Layout, max_faults: int) -> None:
        self.layout, self.max_faults = layout, max_faults
        self.format: Format | None = "text" if layout == "documents" else None
        self.samples, self.fault_count = 0, 0
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()

    def run(
        self, file: BinaryIO, size: int, on_progress: Callable[[int, int], None] | None
    ) -> None:
        told = 0
        try:
            for span in scan.spans(file, self.layout):
                self.take(span)
                done = span.offset + len(span.body)
                if on_progress and done - told >= _BLOCK:
                    told = done
                    on_progress(done, size)
        except RowFault as fault:
            self.add(fault)
        if not self.samples and not self.fault_count:
            self.add(RowFault(0, _EMPTY))
        if on_progress:
            on_progress(size, size)

    def take(self, span: Span) -> None:
        self.samples += 1
        try:
            if self.format is None:
                self.format = _detected(span, self.layout)
            _row(span, self.layout, self.format)
            if self.samples <= _SAMPLE and self.layout != "documents":
                self.ignored |= formats.fields(span.body).keys() - formats.known_fields(self.format)
        except RowFault as fault:
            self.add(fault)

    def add(self, fault: RowFault) -> None:
        self.fault_count += 1
        if len(self.faults) < self.max_faults:
            self.faults.append(
                Fault(line=fault.line, loc=fault.loc[:1000], msg=fault.reason, unit=fault.unit)
            )

    def report(self, size: int, sha256: str) -> FileReport:
        return FileReport(
            format=self.format,
            num_samples=self.samples,
            size=size,
            sha256=sha256,
            faults=tuple(self.faults),
            fault_count=self.fault_count,
            ignored_fields=tuple(sorted(name[:80] for name in self.ignored)[:32]),
        )


_EMPTY = "there is no row in it; one object a line (.jsonl) or an array of objects (.json)"


def _format_of(file: BinaryIO, layout: Layout) -> Format:
    if layout == "documents":
        return "text"
    first: RowFault | None = None
    for seen, span in enumerate(scan.spans(file, layout)):
        try:
            return _detected(span, layout)
        except RowFault as fault:
            first = first or fault
        if seen + 1 >= _SAMPLE:
            break
    raise first or RowFault(0, _EMPTY)


def _detected(span: Span, layout: Layout) -> Format:
    try:
        return formats.detect(formats.fields(span.body))
    except Wrong as wrong:
        raise _fault(span, layout, wrong) from None


def _row(span: Span, layout: Layout, format: Format) -> Row:
    try:
        if layout == "documents":
            return formats.document(_text(span.body), span.line)
        return formats.parse(span.body, format, span.line)
    except Wrong as wrong:
        raise _fault(span, layout, wrong) from None


def _text(body: bytes) -> str:
    try:
        return body.decode().replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        raise Wrong(f"not valid UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _fault(span: Span, layout: Layout, wrong: Wrong) -> RowFault:
    unit = "row" if layout == "array" else "line"
    return RowFault(span.line, wrong.reason, loc=wrong.loc, unit=unit)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()

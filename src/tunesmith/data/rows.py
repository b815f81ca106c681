"""Rows of a data file: read one at random without holding the file, or check them all."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pydantic import Field

from tunesmith.data import scan, twins
from tunesmith.data.reader import SAMPLE, Reader
from tunesmith.data.reading import Reading
from tunesmith.data.row import Format, Row, RowFault
from tunesmith.data.scan import Span
from tunesmith.data.scratch import scratch
from tunesmith.data.twins import Prints, Twins
from tunesmith.spec.strict import Sha256, Strict

__all__ = ["Fault", "FileReport", "Row", "RowFault", "RowIndex", "check_file"]

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
    duplicates: Twins = Twins()
    """Rows that say what an earlier one says; no fault by themselves."""

    @property
    def is_usable(self) -> bool:
        return self.fault_count == 0


class Rows(Protocol):
    """Rows that can be looked at in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> Row: ...

    def size(self, at: int) -> int: ...


class RowIndex:
    """Random access to the rows of a file; only where they stand is held, 24 bytes a row.

    Survives a fork, and may be read from several threads. The rows of a compressed file are written
    out first, as JSON in a file without a name.
    """

    _descriptor = -1

    def __init__(self, file: BinaryIO, reader: Reader, near: Path) -> None:
        self._reader = reader
        self._offsets, self._sizes, self._lines = array("Q"), array("L"), array("Q")
        self.format: Format
        self.format, spans = reader.begin(file)
        if reader.is_compressed:
            with scratch(near) as written:
                self._write_out(spans, written)
                written.flush()
                self._descriptor = os.dup(written.fileno())
            return
        self._descriptor = os.dup(file.fileno())
        for span in spans:
            self._add(span, span.offset)

    @classmethod
    def open(cls, path: Path | str, reading: Reading = Reading()) -> "RowIndex":
        """Find every row. Raises NotFoundError, BadRequestError, or RowFault (broken structure,
        no row, no known format in the first rows).
        """
        path = Path(path)
        with scan.open_regular(path) as file:
            return cls.of(file, path, path.suffix, reading)

    @classmethod
    def of(
        cls, file: BinaryIO, path: Path, suffix: str, reading: Reading = Reading()
    ) -> "RowIndex":
        """`open`, of a file that is open already; `suffix` is its name's, whatever its path's."""
        return cls(file, Reader.of(file, suffix.lower(), reading), path.parent)

    def _write_out(self, spans: Iterable[Span], written: BinaryIO) -> None:
        offset = 0
        for span in spans:
            written.write(span.body)
            self._add(span, offset)
            offset += len(span.body)

    def _add(self, span: Span, offset: int) -> None:
        self._offsets.append(offset)
        self._sizes.append(len(span.body))
        self._lines.append(span.line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, at: int) -> Row:
        """Raises RowFault, and IndexError outside the file."""
        line = self._lines[at]
        return self._reader.row(Span(line, self._offsets[at], self.body(at)), self.format)

    def __iter__(self) -> Iterator[Row]:
        for at in range(len(self)):
            yield self[at]

    def metadata(self, at: int) -> Mapping[str, Any]:
        """What a row says of itself; empty where it says nothing. See `Reading.with_metadata`."""
        return self._reader.metadata(Span(self._lines[at], self._offsets[at], self.body(at)))

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
    reading: Reading = Reading(),
    format: Format | None = None,
) -> FileReport:
    """Read a whole file and check each row, in constant memory.

    `name` is what the file was called, where `path` is a temporary name; its suffix counts.
    `format` is found by the first rows where it is not given.
    `on_progress` is told bytes done and bytes in all, about once a megabyte. Raises NotFoundError
    and BadRequestError for what is no file; everything else is a fault in the report.
    """
    path = Path(path)
    with scan.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with Prints(path.parent) as prints:
            checker = _Checker(prints, max_faults, format)
            checker.run(file, Path(name or path).suffix.lower(), reading, on_progress)
            return checker.report(size, _digest(file))


class _Checker:
    def __init__(self, prints: Prints, max_faults: int, format: Format | None) -> None:
        self.prints, self.max_faults, self.format = prints, max_faults, format
        self.samples, self.fault_count = 0, 0
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()

    def run(
        self,
        file: BinaryIO,
        suffix: str,
        reading: Reading,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        size = os.fstat(file.fileno()).st_size
        try:
            self.reader = Reader.of(file, suffix, reading)
            if self.reader.layout == "documents":
                self.format = "text"
            told = 0
            for span in self.reader.spans(file):
                self.take(span)
                done = span.offset + len(span.body)
                if on_progress and done - told >= _BLOCK and not self.reader.is_compressed:
                    told = done
                    on_progress(done, size)
        except RowFault as fault:
            self.add(fault)
        if not self.samples and not self.fault_count:
            self.add(self.reader.nothing)
        if on_progress:
            on_progress(size, size)

    def take(self, span: Span) -> None:
        self.samples += 1
        try:
            if self.format is None:
                self.format = self.reader.detected(span)
            self.prints.add(self.reader.row(span, self.format))
            if self.samples <= SAMPLE:
                self.ignored |= self.reader.ignored(span, self.format)
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
            duplicates=twins.repeats(self.prints),
        )


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()

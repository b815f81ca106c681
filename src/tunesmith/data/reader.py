"""One file's rows, whatever they stand in: told apart, numbered, brought into one format."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, BinaryIO

import msgspec

from tunesmith.data import formats, parquet, row_adapters, scan, tables
from tunesmith.data.built import document
from tunesmith.data.reading import Reading, as_json
from tunesmith.data.row import FORMATS, Format, Row, RowFault, Wrong
from tunesmith.data.row_adapters import RANK, TARGETS
from tunesmith.data.scan import Layout, Span

METADATA = "metadata"
SAMPLE = 20
"""Rows looked at to find the format."""
_NESTED = (
    *("messages", "conversations", "tools", "history", TARGETS),
    *("chosen", "rejected", "responses", "preferred_output", "non_preferred_output"),
)
"""Fields that a cell of text holds as JSON."""
_EMPTY = {
    "csv": "there is no row in it under the names of the columns",
    "parquet": "there is no row in it",
}
_NO_ROW = "there is no row in it; one object a line (.jsonl) or an array of objects (.json)"


@dataclass
class Reader:
    layout: Layout
    reading: Reading
    head: tables.Head | None = None
    """Of a CSV file."""
    columns: tuple[str, ...] = ()
    """Of a Parquet file, once its rows were begun."""

    @classmethod
    def of(cls, file: BinaryIO, suffix: str, reading: Reading = Reading()) -> "Reader":
        """Raises RowFault where the head of a table cannot be read."""
        layout = scan.layout_of(file, suffix)
        if reading.columns and layout == "documents":
            raise RowFault(0, "plain text has no columns to map; leave the mapping out")
        head = tables.read_head(file, suffix) if layout == "csv" else None
        return cls(layout, reading, head)

    @property
    def unit(self) -> str:
        return "row" if self.layout in ("array", "parquet") else "line"

    @property
    def nothing(self) -> RowFault:
        return RowFault(0, _EMPTY.get(self.layout, _NO_ROW))

    @property
    def is_compressed(self) -> bool:
        """A row stands nowhere in the file as it is."""
        return self.layout == "parquet"

    def spans(self, file: BinaryIO) -> Iterator[Span]:
        """The rows from the first one on. Raises RowFault where the structure breaks off."""
        if self.layout == "parquet":
            file.seek(0)
            self.columns, found = parquet.rows(file, self._wanted())
            return found
        if self.head is not None:
            return tables.records(file, self.head)
        return scan.spans(file, self.layout)

    def begin(self, file: BinaryIO) -> tuple[Format, Iterator[Span]]:
        """The format, by the first rows, and all rows. Raises RowFault."""
        found = self.spans(file)
        if self.layout == "documents":
            return "text", found
        first: RowFault | None = None
        held: list[Span] = []
        for span in found:
            held.append(span)
            try:
                return self.detected(span), chain(held, found)
            except RowFault as fault:
                first = first or fault
            if len(held) >= SAMPLE:
                break
        raise first or self.nothing

    def detected(self, span: Span) -> Format:
        try:
            return formats.detect(self._fields(span.body))
        except Wrong as wrong:
            raise self._fault(span, wrong) from None

    def names(self, span: Span) -> Collection[str]:
        """Of all the columns of a row. Raises Wrong."""
        return self.columns or self._found(span.body)

    def ignored(self, span: Span, format: Format) -> set[str]:
        """Columns of a row that mean nothing in its format."""
        if self.layout == "documents":
            return set()
        if self.reading.columns:
            return set(self.names(span)) - {column for _, column in self.reading.columns}
        known = formats.known_fields(format)
        own = {TARGETS, RANK} if format in row_adapters.FORMATS else set[str]()
        return {name for name in self.names(span) if name} - known - own

    def row(self, span: Span, format: Format) -> Row:
        """Raises RowFault."""
        try:
            return self.reading.checked(self._row(span, format))
        except Wrong as wrong:
            raise self._fault(span, wrong) from None

    def metadata(self, span: Span) -> Mapping[str, Any]:
        """Of a row, where it is an object, or a cell that holds one as JSON."""
        if self.layout == "documents":
            return {}
        name = dict(self.reading.columns).get(METADATA, METADATA)
        try:
            value = self._found(span.body).get(name)
            found = msgspec.json.decode(value) if isinstance(value, str) else value
        except (Wrong, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _row(self, span: Span, format: Format) -> Row:
        body = self.reading.cleaned(span.body)
        if self.layout == "documents":
            return document(self.reading.plain(_text(body)), span.line)
        if self.head is not None:
            body = as_json(self._fields(body))
        elif self.layout == "parquet":
            body = self.reading.mapped(parquet.body_of(body), self.columns)
        else:
            body = self.reading.mapped(body)
        row = formats.parse(body, format, span.line)
        adapter = row_adapters.find(body, format, by_rank=self.reading.by_rank)
        return row if adapter is None else replace(row, adapter=adapter)

    def _fields(self, body: bytes) -> dict[str, Any]:
        """By the names of the formats, hand-mapped ones too. Raises Wrong."""
        found = self.reading.chosen(self._found(body), self.columns)
        return _unpacked(found) if self.head is not None else found

    def _found(self, body: bytes) -> dict[str, Any]:
        body = self.reading.cleaned(body)
        if self.head is not None:
            return dict(tables.cells(body, self.head))
        if self.layout == "parquet":
            found = formats.fields(parquet.body_of(body))
            return found or dict.fromkeys(self.columns)
        return formats.fields(body)

    def _wanted(self) -> list[str]:
        more = [METADATA] if self.reading.with_metadata else []
        if self.reading.columns:
            return [*(column for _, column in self.reading.columns), *more]
        return sorted({TARGETS, RANK, *more}.union(*map(formats.known_fields, FORMATS)))

    def _fault(self, span: Span, wrong: Wrong) -> RowFault:
        return RowFault(span.line, wrong.reason, loc=wrong.loc, unit=self.unit)


def find_row(
    file: BinaryIO, suffix: str, reading: Reading, *, row: int | None = None, line: int = 1
) -> tuple[Row, Format, int]:
    """The row of a number or the one at a line, both from 1; the format; the row's number.

    Reads no further than that. Raises RowFault: what is wrong with it, or that it is not there.
    """
    reader = Reader.of(file, suffix, reading)
    format, spans = reader.begin(file)
    number = 0
    for number, span in enumerate(spans, 1):
        lines = 1 if reader.unit == "row" else max(1, span.body.count(b"\n"))
        if row is None and line < span.line:
            raise RowFault(line, f"no row stands there; the next one begins in line {span.line}")
        if number == row or (row is None and line < span.line + lines):
            return reader.row(span, format), format, number
    unit, asked = ("row", row) if row is not None else (reader.unit, line)
    raise RowFault(asked, f"the file ends before it, after {number} rows", unit=unit)


def _text(body: bytes) -> str:
    try:
        return body.decode().replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        raise Wrong(f"not valid UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _unpacked(found: dict[str, Any]) -> dict[str, Any]:
    """Cells that hold a list, read. Raises Wrong."""
    for name in _NESTED:
        cell = found.get(name)
        if isinstance(cell, str) and not cell.strip():
            del found[name]
        elif isinstance(cell, str) and cell.lstrip()[:1] == "[":
            try:
                found[name] = msgspec.json.decode(cell)
            except (ValueError, RecursionError) as error:
                raise Wrong(f"a list that is not JSON: {str(error)[:120]}", name) from None
    return found

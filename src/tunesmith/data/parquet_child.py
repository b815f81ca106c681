"""Reads a Parquet file and writes its rows, a line of JSON each: a process of its own.

    python -P parquet_child.py FILENO FIELD,…

The file may come from a stranger and the reader is C++: here it has little memory, and may crash.
Lines begin with `#` (the columns), `{` (a row), `!` (a row that cannot be read), `?` (the file
cannot be read), `.` (the end).
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

MEMORY_BYTES = 1 << 30
"""Of address space; about a third goes to the library itself."""
MAX_COLUMNS = 4096
MAX_ROWS = 200_000_000
BATCH_BYTES, BATCH_ROWS = 8 << 20, 1024
PLAIN_BYTES = 32 << 20
"""A batch beyond this is turned to Python a row at a time."""


class Refused(Exception):
    """Why the file cannot be read, in a sentence."""


def main(fileno: int, wanted: list[str], out: BinaryIO) -> None:
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with os.fdopen(fileno, "rb") as file:
            for line in lines(file, wanted):
                out.write(line)
        out.write(b".\n")
    except Refused as refused:
        out.write(b"?" + json.dumps(str(refused)).encode() + b"\n")
    except MemoryError:
        told = (
            f"reading it takes more than {MEMORY_BYTES >> 30} GB of memory; write it anew with "
            "smaller pages and without a dictionary"
        )
        out.write(b"?" + json.dumps(told).encode() + b"\n")
    out.flush()


def lines(file: BinaryIO, wanted: list[str]) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise Refused(
            "reading Parquet needs pyarrow; pip install 'tunesmith[data]', or send CSV or JSONL"
        ) from None
    pyarrow.set_cpu_count(1)
    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        yield from rows(table, wanted)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise Refused(f"not a Parquet file that can be read: {words}") from None


def rows(table: Any, wanted: list[str]) -> Iterator[bytes]:
    names = table.schema_arrow.names
    if len(names) > MAX_COLUMNS or table.metadata.num_columns > 8 * MAX_COLUMNS:
        raise Refused(f"{len(names):,} columns; {MAX_COLUMNS:,} is the limit")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused(f"the column {twice[:80]!r} is there twice; rename one")
    count = table.metadata.num_rows
    if not 0 <= count <= MAX_ROWS:
        raise Refused(f"it says that it has {count:,} rows; {MAX_ROWS:,} is the limit")
    yield b"#" + json.dumps(names).encode() + b"\n"
    chosen = [name for name in names if name in wanted]
    if not chosen:
        # Every row lacks the same: one is enough to say so.
        yield b"{}\n" * min(count, 1)
        return
    number = 0
    for batch in table.iter_batches(rows_a_batch(table), columns=chosen, use_threads=False):
        for row in plain(batch):
            number += 1
            yield line_of(row)


def rows_a_batch(table: Any) -> int:
    metadata = table.metadata
    groups = range(min(metadata.num_row_groups, 64))
    sizes = [metadata.row_group(at) for at in groups]
    widest = max((one.total_byte_size / max(one.num_rows, 1) for one in sizes), default=1.0)
    return int(min(BATCH_ROWS, max(1.0, BATCH_BYTES / max(widest, 1.0))))


def plain(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Its rows; of one whose text is none, what is wrong with it."""
    if batch.nbytes <= PLAIN_BYTES:
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError:  # nothing was handed out yet: row by row, then
            pass
    for at in range(batch.num_rows):
        try:
            yield from batch.slice(at, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield error


def line_of(row: dict[str, Any] | UnicodeDecodeError) -> bytes:
    import msgspec

    try:
        if isinstance(row, UnicodeDecodeError):
            raise row
        found = {name: text_of(value) for name, value in row.items()}
        return msgspec.json.encode(found) + b"\n"
    except UnicodeDecodeError as error:
        told = f"not valid UTF-8 at byte {error.start + 1} of a cell; save the text as UTF-8"
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        told = f"a value that JSON has no word for: {str(error)[:200]}"
    return b"!" + json.dumps(told).encode() + b"\n"


def text_of(value: Any) -> Any:
    """Some writers leave out that bytes are text."""
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.stdout.buffer)

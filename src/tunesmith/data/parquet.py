"""Parquet: its rows as JSON, from a process that may run out of memory or crash alone."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tunesmith.data.row import RowFault, Wrong
from tunesmith.data.scan import MAX_ROW, Span

MAGIC = b"PAR1"
SPREAD, SPREAD_FROM = 200, 1 << 30
"""What a file may come to as JSON: so many times its size, and a gigabyte in any case."""
_CHILD = Path(__file__).with_name("parquet_child.py")
_REFUSED = b"!"


def rows(file: BinaryIO, wanted: Sequence[str]) -> tuple[tuple[str, ...], Iterator[Span]]:
    """The names of all columns, and the rows with the `wanted` ones. Raises RowFault."""
    size = os.fstat(file.fileno()).st_size
    lines = _lines(file.fileno(), wanted)
    first = next(lines)
    names = tuple(map(str, json.loads(first[1:])))
    return names, _spans(lines, max(SPREAD_FROM, SPREAD * size))


def body_of(body: bytes) -> bytes:
    """A row's JSON. Raises Wrong for one that could not be read."""
    if body.startswith(_REFUSED):
        raise Wrong(json.loads(body[1:]))
    return body


def _spans(lines: Iterator[bytes], most: int) -> Iterator[Span]:
    written = 0
    for number, line in enumerate(lines, 1):
        written += len(line)
        if written > most:
            raise RowFault(
                number, f"the rows up to here come to over {most >> 20} MB of text", unit="row"
            )
        if len(line) > MAX_ROW:
            raise RowFault(number, f"longer than {MAX_ROW >> 20} MB", unit="row")
        yield Span(number, 0, line)


def _lines(fileno: int, wanted: Sequence[str]) -> Iterator[bytes]:
    """Its lines but for the end's. Raises RowFault where it says why, and where it just ended."""
    command = [sys.executable, "-P", str(_CHILD), str(fileno), json.dumps(list(wanted))]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[fileno],
    )
    assert child.stdout is not None
    is_whole = False
    try:
        while line := child.stdout.readline(MAX_ROW + 2):
            if line[:1] == b"?":
                raise RowFault(0, str(json.loads(line[1:])))
            is_whole = line == b".\n"
            if is_whole:
                return
            yield line
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.stdout.close()
        child.wait()
    raise RowFault(0, "not a Parquet file that can be read: its reader ended in the middle")

"""Uploads: streamed from the disk, with progress."""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tuning_sdk.models import Dataset, Preview
from tuning_sdk.retry import Call
from tuning_sdk.transport import Transport

OnSent = Callable[[int, int], None]
"""Called with the bytes sent so far and the size of the file."""

_READ_SECONDS = 600.0
"""The server answers once it has checked the whole file."""


class Datasets:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self,
        path: str | Path,
        on_progress: OnSent | None = None,
        *,
        columns: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Send a file; it is checked while it is stored, under the names that `columns` maps.

        Raises FileNotFoundError, ValidationError (with the faulty lines), PayloadTooLargeError.
        """
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"no file {str(source)!r}")

        @contextmanager
        def opened() -> Iterator[dict[str, Any]]:
            with source.open("rb") as file:
                measured = _Measured(file, source.stat().st_size, on_progress)
                yield {"files": {"file": (source.name, measured, "application/octet-stream")}}

        call = Call(
            "POST",
            "/upload/dataset",
            params={"columns": json.dumps(dict(columns))} if columns else {},
            idempotency_key=str(uuid.uuid4()),
            read_seconds=_READ_SECONDS,
        )
        return Dataset.of(self._transport.send(call, opened))

    def preview(
        self,
        dataset_path: str | os.PathLike[str],
        model_name: str,
        row: int | None = None,
        *,
        line: int | None = None,
        **fields: Any,
    ) -> Preview:
        """A row as it would be trained on: its tokens, and which of them are learnt.

        `fields` are those of POST /data/preview, such as `max_length`, `overlong`, `columns`.
        Raises NotFoundError, ValidationError (the row cannot be read, or is not there).
        """
        body = {
            "dataset_path": os.fspath(dataset_path),
            "model_name": model_name,
            "row": row,
            "line": line,
            **fields,
        }
        call = Call("POST", "/data/preview", json=body, read_seconds=_READ_SECONDS)
        return Preview.of(self._transport.send(call))


class _Measured:
    """A file that says how far it was read."""

    def __init__(self, file: BinaryIO, size: int, on_progress: OnSent | None) -> None:
        self._file, self._size, self._on_progress = file, size, on_progress

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        if self._on_progress is not None and block:
            self._on_progress(self._file.tell(), self._size)
        return block

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

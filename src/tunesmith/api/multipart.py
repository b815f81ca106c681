"""The one file of a multipart body, handed on as it comes: nothing is spooled anywhere."""

from collections.abc import AsyncIterator

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tunesmith.errors import BadRequestError, ValidationError

MAX_PARTS = 16
MAX_OTHER_BYTES = 64 << 10
"""Of fields beside the file, together; they mean nothing to us."""


class FilePart:
    """Finds the file called `field` in a multipart body that is fed in pieces of any size."""

    def __init__(self, content_type: str, field: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
            raise _wrong(field, "send a multipart/form-data body with its boundary named")
        self.filename: str | None = None
        self._field = field
        self._is_inside = self._is_whole = False
        self._parts = self._others = 0
        self._name, self._value, self._disposition = b"", b"", b""
        self._found: list[bytes] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": self._data,
                "on_part_end": self._part_end,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_end,
            },
        )

    def feed(self, body: bytes) -> bytes:
        """The bytes of the file that are in this piece. Raises BadRequestError."""
        try:
            self._parser.write(body)
        except FormParserError as error:
            raise BadRequestError(
                f"{self._field}: the multipart body is broken: {str(error)[:200]}",
                param=self._field,
            ) from None
        found, self._found = b"".join(self._found), []
        return found

    def end(self) -> str:
        """The file's name. Raises where there was no file, or it broke off."""
        if self.filename is None:
            raise _wrong(self._field, "no file came; send it in a part of this name")
        if not self._is_whole:
            raise BadRequestError(f"{self._field}: the upload broke off", param=self._field)
        return self.filename

    def _begin(self) -> None:
        self._parts += 1
        self._disposition = b""
        if self._parts > MAX_PARTS:
            raise BadRequestError(f"{self._field}: over {MAX_PARTS} parts", param=self._field)

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if _text(options.get(b"name", b"")) != self._field:
            return
        if self.filename is not None:
            raise BadRequestError(f"{self._field}: one file at a time", param=self._field)
        if b"filename" not in options:
            raise _wrong(self._field, "send it as a file, with a file name")
        self.filename = _text(options[b"filename"])
        self._is_inside = True

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_inside:
            self._found.append(data[start:end])
            return
        self._others += end - start
        if self._others > MAX_OTHER_BYTES:
            raise BadRequestError(
                f"{self._field}: over {MAX_OTHER_BYTES} bytes in other parts", param=self._field
            )

    def _part_end(self) -> None:
        self._is_whole = self._is_whole or self._is_inside
        self._is_inside = False


async def pieces(request: Request, part: FilePart, size: int) -> AsyncIterator[bytes]:
    """The file's bytes in pieces of at least `size`, but for the last."""
    held: list[bytes] = []
    held_size = 0
    async for body in request.stream():
        found = part.feed(body)
        held.append(found)
        held_size += len(found)
        if held_size >= size:
            yield b"".join(held)
            held, held_size = [], 0
    yield b"".join(held)


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def _wrong(field: str, message: str) -> ValidationError:
    fault = {"loc": ["body", field], "msg": message, "type": "missing"}
    return ValidationError(f"{field}: {message}", param=field, details=[fault])

"""A request's body as JSON, strictly: bounded, finite, and never a 500."""

from typing import Any, NoReturn, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError

from tunesmith.errors import BadRequestError, PayloadTooLargeError

MAX_DEPTH = 64

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """Returns the JSON object that a request carries.

    Raises PayloadTooLargeError beyond `max_bytes`, read no further, and BadRequestError for
    anything but one object of sane depth with finite numbers and whole characters.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            _too_large(max_bytes)
        parts.append(part)
    return parse(b"".join(parts))


def parse(body: bytes) -> dict[str, Any]:
    """Raises BadRequestError (`invalid_json`) with what is wrong."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        _refuse(f"the body is not JSON: {str(error)[:200]}")
    except RecursionError:
        _refuse(f"the body nests too deep; at most {MAX_DEPTH} levels")
    _check_depth(value)
    if not isinstance(value, dict):
        _refuse("the body must be a JSON object")
    return value


def validate(model: type[Model], value: dict[str, Any]) -> Model:
    """Raises BadRequestError with `param` the dotted field; the value itself is not repeated."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = _dotted(fault["loc"])
        code = "missing_required_parameter" if fault["type"] == "missing" else "invalid_value"
        raise BadRequestError(
            f"{field or 'body'}: {fault['msg']}", error_code=code, param=field or None
        ) from None


def _dotted(location: tuple[int | str, ...]) -> str:
    """The field's path; a union's own labels (`list[…]`, `constrained-str`) are left out."""
    is_label = {"str", "int"}.__contains__
    parts = [
        str(part)
        for part in location
        if isinstance(part, int) or (part.isidentifier() and not is_label(part))
    ]
    return ".".join(parts)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            _refuse(f"the body nests too deep; at most {MAX_DEPTH} levels")
        deeper: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                deeper += each.values()
            elif isinstance(each, list):
                deeper += each
        level = deeper


def _refuse(message: str) -> NoReturn:
    raise BadRequestError(message, error_code="invalid_json")


def _too_large(max_bytes: int) -> NoReturn:
    raise PayloadTooLargeError(f"the body is over {max_bytes} bytes")

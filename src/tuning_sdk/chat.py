"""Asking a served model, with its answer as a stream of text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuning_sdk.errors import TuningAPIError
from tuning_sdk.events import read_events
from tuning_sdk.retry import Call, error_of
from tuning_sdk.transport import Transport

CHAT_PATH = "/v1/chat/completions"
READ_SECONDS = 600.0
"""A first answer may have to wait until the model is loaded."""


def stream_chat(
    transport: Transport, model: str, messages: Sequence[Mapping[str, Any]], **options: Any
) -> Iterator[str]:
    """The answer's text, piece by piece. Closing the iterator stops the generation."""
    body = {"model": model, "messages": list(messages), "stream": True, **options}
    headers = {"Accept": "text/event-stream"}
    call = Call("POST", CHAT_PATH, json=body, headers=headers, read_seconds=READ_SECONDS)
    with transport.stream(call) as response:
        for line in read_events(response):
            if line.data == "[DONE]":
                return
            text = _piece(line.data)
            if text:
                yield text


def whole_chat(
    transport: Transport, model: str, messages: Sequence[Mapping[str, Any]], **options: Any
) -> str:
    """The answer's text at once."""
    body = {"model": model, "messages": list(messages), **options}
    answer = transport.send(Call("POST", CHAT_PATH, json=body, read_seconds=READ_SECONDS))
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise TuningAPIError(f"{CHAT_PATH} answered without a choice") from None


def _piece(data: str) -> str:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise TuningAPIError(f"{CHAT_PATH} sent a piece that is no JSON") from None
    if isinstance(chunk, dict) and "error" in chunk:
        raise error_of(status_of(chunk["error"]), {}, data.encode())
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    if not isinstance(choices, list) or not choices:
        return ""
    delta = choices[0].get("delta") or {}
    return str(delta.get("content") or "")


def status_of(error: Any) -> int:
    """Of an error told inside a stream."""
    status = error.get("status") if isinstance(error, dict) else None
    return status if isinstance(status, int) and 400 <= status < 600 else 500

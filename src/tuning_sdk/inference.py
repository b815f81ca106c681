"""Asking a model directly: `LLMClient`, for a server of the inference contract.

That is `tunesmith serve` by itself, or a whole service, which has the same routes.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from tuning_sdk.chat import status_of
from tuning_sdk.errors import TuningAPIError
from tuning_sdk.events import read_events
from tuning_sdk.models import ChatAnswer, Generation, LoadedModel, ModelInfo
from tuning_sdk.retry import Call, error_of
from tuning_sdk.transport import Transport

DEFAULT_URL = "http://127.0.0.1:8000"
READ_SECONDS = 600.0
"""A first answer, and a model that is loaded, may take long."""
Messages = Sequence[Mapping[str, Any]]


class LLMClient:
    """Close it, or use it in a `with`. Safe to share between threads.

    `base_url` and `api_key` default to TUNESMITH_BASE_URL and TUNESMITH_API_KEY, `base_url` then
    to http://127.0.0.1:8000. Options that are not given are the server's: max_new_tokens 256,
    temperature 0.7, top_p 0.9, top_k 50, repetition_penalty 1.1. What is refused is raised as the
    leaf of TuningAPIError that the server raised. Raises ValueError for an address or a key that
    cannot be one.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
    ) -> None:
        key = os.environ.get("TUNESMITH_API_KEY") if api_key is None else api_key
        url = base_url or os.environ.get("TUNESMITH_BASE_URL") or DEFAULT_URL
        self.transport = Transport(url, key, timeout, max_retries)

    @property
    def base_url(self) -> str:
        return self.transport.base_url

    def __repr__(self) -> str:
        return f"LLMClient(base_url={self.base_url!r})"

    def health_check(self) -> dict[str, Any]:
        """GET /health, as it is: `status`, `model_loaded`, `model_name`, `device`, …"""
        return dict(self.transport.send(Call("GET", "/health")))

    def model_info(self) -> ModelInfo:
        """The model that is loaded. Raises NotReadyError (503) where there is none."""
        return ModelInfo.of(self.transport.send(Call("GET", "/model_info")))

    def load_model(
        self, model_path: str, *, load_in_8bit: bool = False, load_in_4bit: bool = False
    ) -> LoadedModel:
        """Have another model loaded; returns once it serves. The old one serves meanwhile."""
        params = {
            "model_path": model_path,
            "load_in_8bit": str(load_in_8bit).lower(),
            "load_in_4bit": str(load_in_4bit).lower(),
        }
        call = Call("POST", "/load_model", params=params, read_seconds=READ_SECONDS)
        return LoadedModel.of(self.transport.send(call))

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, **options: Any
    ) -> Generation: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
    def generate(
        self, prompt: str, *, stream: bool = False, **options: Any
    ) -> Generation | Iterator[str]:
        """Go on with a text; with `stream=True` the continuation, piece by piece.

        `options`: max_new_tokens, temperature, top_p, top_k, repetition_penalty, do_sample,
        num_return_sequences, model, stop, seed.
        """
        body = {"prompt": prompt, **options}
        if not stream:
            return Generation.of(self._ask("/generate", body))
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("a stream has one continuation: leave num_return_sequences out")
        return self._stream("/generate", body)

    @overload
    def chat(
        self,
        instruction: str = "",
        input: str = "",
        *,
        messages: Messages | None = None,
        stream: Literal[False] = False,
        **options: Any,
    ) -> ChatAnswer: ...
    @overload
    def chat(
        self,
        instruction: str = "",
        input: str = "",
        *,
        messages: Messages | None = None,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[str]: ...
    def chat(
        self,
        instruction: str = "",
        input: str = "",
        *,
        messages: Messages | None = None,
        stream: bool = False,
        **options: Any,
    ) -> ChatAnswer | Iterator[str]:
        """Answer an instruction, or a conversation of `messages`; with `stream=True` in pieces.

        `options`: max_new_tokens, temperature, top_p, do_sample, model, stop, seed.
        """
        asked = {"instruction": instruction, "input": input} if instruction else {}
        body: dict[str, Any] = asked | ({"messages": list(messages)} if messages else {}) | options
        if stream:
            return self._stream("/chat", body)
        return ChatAnswer.of(self._ask("/chat", body))

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        return self.transport.send(Call("POST", path, json=body, read_seconds=READ_SECONDS))

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """Closing the iterator stops the generation."""
        headers = {"Accept": "text/event-stream"}
        asked = {**body, "stream": True}
        call = Call("POST", path, json=asked, headers=headers, read_seconds=READ_SECONDS)
        with self.transport.stream(call) as response:
            for line in read_events(response):
                if line.data == "[DONE]":
                    return
                if text := _piece(path, line.data):
                    yield text
        raise TuningAPIError(f"{path}: the answer broke off")

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _piece(path: str, data: str) -> str:
    """The text of an event; the last one, which has all of it, brings nothing new."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise TuningAPIError(f"{path} sent a piece that is no JSON object")
    if "error" in event:
        raise error_of(status_of(event["error"]), {}, data.encode())
    return str(event.get("token") or "")

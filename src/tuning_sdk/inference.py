"""Asking a model directly: `LLMClient` and its async twin, for the inference contract.

That is `tunesmith serve` by itself, or a whole service, which has the same routes.
"""

import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from tuning_sdk.chat import status_of
from tuning_sdk.errors import TuningAPIError
from tuning_sdk.events import read_events, read_events_async
from tuning_sdk.models import ChatAnswer, Generation, LoadedModel, ModelInfo
from tuning_sdk.retry import Call, error_of
from tuning_sdk.transport import Transport
from tuning_sdk.transport_async import AsyncTransport

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
        self.transport = Transport(*_place(base_url, api_key), timeout, max_retries)

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
        call = _load_call(model_path, load_in_8bit, load_in_4bit)
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
        call = _generate_call(prompt, options, stream)
        return self._stream(call) if stream else Generation.of(self.transport.send(call))

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
        call = _chat_call(instruction, input, messages, options, stream)
        return self._stream(call) if stream else ChatAnswer.of(self.transport.send(call))

    def _stream(self, call: Call) -> Iterator[str]:
        """Closing the iterator stops the generation."""
        with self.transport.stream(call) as response:
            for line in read_events(response):
                if line.data == "[DONE]":
                    return
                if text := _piece(call.path, line.data):
                    yield text
        raise TuningAPIError(f"{call.path}: the answer broke off")

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


class AsyncLLMClient:
    """`LLMClient` for a program that awaits: close it, or use it in an `async with`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
    ) -> None:
        self.transport = AsyncTransport(*_place(base_url, api_key), timeout, max_retries)

    @property
    def base_url(self) -> str:
        return self.transport.base_url

    def __repr__(self) -> str:
        return f"AsyncLLMClient(base_url={self.base_url!r})"

    async def health_check(self) -> dict[str, Any]:
        """As `LLMClient.health_check`."""
        return dict(await self.transport.send(Call("GET", "/health")))

    async def model_info(self) -> ModelInfo:
        """As `LLMClient.model_info`."""
        return ModelInfo.of(await self.transport.send(Call("GET", "/model_info")))

    async def load_model(
        self, model_path: str, *, load_in_8bit: bool = False, load_in_4bit: bool = False
    ) -> LoadedModel:
        """As `LLMClient.load_model`."""
        call = _load_call(model_path, load_in_8bit, load_in_4bit)
        return LoadedModel.of(await self.transport.send(call))

    async def generate(self, prompt: str, **options: Any) -> Generation:
        """As `LLMClient.generate`, whole."""
        return Generation.of(await self.transport.send(_generate_call(prompt, options, False)))

    def stream_generate(self, prompt: str, **options: Any) -> AsyncIterator[str]:
        """The continuation, piece by piece: `async for`."""
        return self._stream(_generate_call(prompt, options, True))

    async def chat(
        self,
        instruction: str = "",
        input: str = "",
        *,
        messages: Messages | None = None,
        **options: Any,
    ) -> ChatAnswer:
        """As `LLMClient.chat`, whole."""
        call = _chat_call(instruction, input, messages, options, False)
        return ChatAnswer.of(await self.transport.send(call))

    def stream_chat(
        self,
        instruction: str = "",
        input: str = "",
        *,
        messages: Messages | None = None,
        **options: Any,
    ) -> AsyncIterator[str]:
        """The answer, piece by piece: `async for`."""
        return self._stream(_chat_call(instruction, input, messages, options, True))

    async def _stream(self, call: Call) -> AsyncIterator[str]:
        async with self.transport.stream(call) as response:
            async for line in read_events_async(response):
                if line.data == "[DONE]":
                    return
                if text := _piece(call.path, line.data):
                    yield text
        raise TuningAPIError(f"{call.path}: the answer broke off")

    async def close(self) -> None:
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _place(base_url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """Address and key: as given, else of the environment."""
    key = os.environ.get("TUNESMITH_API_KEY") if api_key is None else api_key
    return base_url or os.environ.get("TUNESMITH_BASE_URL") or DEFAULT_URL, key


def _load_call(model_path: str, load_in_8bit: bool, load_in_4bit: bool) -> Call:
    params = {
        "model_path": model_path,
        "load_in_8bit": str(load_in_8bit).lower(),
        "load_in_4bit": str(load_in_4bit).lower(),
    }
    return Call("POST", "/load_model", params=params, read_seconds=READ_SECONDS)


def _generate_call(prompt: str, options: Mapping[str, Any], is_stream: bool) -> Call:
    if is_stream and options.get("num_return_sequences", 1) != 1:
        raise ValueError("a stream has one continuation: leave num_return_sequences out")
    return _question("/generate", {"prompt": prompt, **options}, is_stream)


def _chat_call(
    instruction: str,
    input: str,
    messages: Messages | None,
    options: Mapping[str, Any],
    is_stream: bool,
) -> Call:
    body: dict[str, Any] = {"instruction": instruction, "input": input} if instruction else {}
    body |= {"messages": list(messages)} if messages else {}
    return _question("/chat", {**body, **options}, is_stream)


def _question(path: str, body: dict[str, Any], is_stream: bool) -> Call:
    headers = {"Accept": "text/event-stream"} if is_stream else {}
    asked = {**body, "stream": True} if is_stream else body
    return Call("POST", path, json=asked, headers=headers, read_seconds=READ_SECONDS)


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

"""The client: where the server is, with which key, and what can be asked of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from tuning_sdk.chat import stream_chat, whole_chat
from tuning_sdk.datasets import Datasets
from tuning_sdk.jobs import Jobs
from tuning_sdk.models import Model
from tuning_sdk.retry import Call
from tuning_sdk.transport import Transport

DEFAULT_URL = "http://127.0.0.1:8000"


class TuningClient:
    """Close it, or use it in a `with`. Safe to share between threads.

    `api_key` and `base_url` default to TUNESMITH_API_KEY and TUNESMITH_BASE_URL, `base_url` then
    to http://127.0.0.1:8000. `timeout` is in seconds, for one try; `max_retries` counts the tries
    after the first. Raises ValueError for an address or a key that cannot be one.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
    ) -> None:
        key = os.environ.get("TUNESMITH_API_KEY") if api_key is None else api_key
        url = base_url or os.environ.get("TUNESMITH_BASE_URL") or DEFAULT_URL
        self.transport = Transport(url, key, timeout, max_retries)
        self.jobs = Jobs(self.transport)
        self.datasets = Datasets(self.transport)
        self.models = Models(self.transport)

    @property
    def base_url(self) -> str:
        return self.transport.base_url

    def __repr__(self) -> str:
        return f"TuningClient(base_url={self.base_url!r})"

    def health_check(self) -> dict[str, Any]:
        """GET /health, as it is."""
        return dict(self.transport.send(Call("GET", "/health")))

    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True] = True,
        **options: Any,
    ) -> Iterator[str]: ...
    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False],
        **options: Any,
    ) -> str: ...
    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = True,
        **options: Any,
    ) -> Iterator[str] | str:
        """The answer's text: an iterator of pieces, or with `stream=False` the whole.

        `options` are those of the chat route: max_tokens, temperature, top_p, seed, stop, …
        """
        ask = stream_chat if stream else whole_chat
        return ask(self.transport, model, messages, **options)

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


class Models:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> list[Model]:
        """All that can be named in `chat`."""
        answer = self._transport.send(Call("GET", "/v1/models"))
        return [Model.of(item) for item in answer["data"]]

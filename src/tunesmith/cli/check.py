"""`check URL`: call each endpoint of a server once, and say what came of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.cli.place import JsonOption, KeyOption
from tunesmith.cli.terminal import FAILED, USAGE, CommandError, show_json, show_rows, tell

if TYPE_CHECKING:
    from tuning_sdk import LLMClient

TOKENS = 8
_MAX_SHOWN = 60
_NO_MODEL = "no model is loaded"
Messages = list[dict[str, str]]


State = Literal["ok", "skipped", "FAILED"]


@dataclass(frozen=True)
class Outcome:
    endpoint: str
    state: State
    seconds: float
    told: str


def check(
    url: Annotated[str, typer.Argument(help="http://host:port of an engine, or of a service.")],
    only: Annotated[
        str | None, typer.Option(help="Some of them, with commas: health,models,info,generate,…")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="To ask; if not said, the one that is loaded.")
    ] = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Call each endpoint of a server and show a table; fails where one of them does.

    Where no model is loaded, what wants one is skipped, unless it was asked for with --only.
    """
    from tuning_sdk import LLMClient

    try:
        client = LLMClient(url, api_key, max_retries=0)
    except ValueError as error:
        raise CommandError(str(error), code=USAGE) from None
    with client:
        checks = Checks(client, model)
        names = _chosen(only, list(checks.all))
        outcomes = [_tried(name, checks.all[name], names != list(checks.all)) for name in names]
    if as_json:
        show_json([vars(one) for one in outcomes])
    else:
        rows = [[one.endpoint, one.state, f"{one.seconds:.2f} s", one.told] for one in outcomes]
        show_rows(rows, ["ENDPOINT", "STATE", "TIME", "ANSWER"])
    failed = [one.endpoint for one in outcomes if one.state == "FAILED"]
    if failed:
        tell(f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}")
        raise typer.Exit(FAILED)


class Checks:
    """What is called, by name, in this order. Each returns what to show, or raises."""

    def __init__(self, client: "LLMClient", model: str | None) -> None:
        self._client, self._model = client, model
        self._options: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 0.0}
        self._options |= {"model": model} if model else {}
        self.all: dict[str, Callable[[], str]] = {
            "health": self._health,
            "models": self._models,
            "info": self._info,
            "generate": self._generate,
            "chat": self._chat,
            "stream": self._stream,
            "completions": self._completions,
            "chat-completions": self._chat_completions,
            "embeddings": self._embeddings,
        }

    def _health(self) -> str:
        told = self._client.health_check()
        if told.get("status") != "healthy":
            raise ValueError(f"status is {told.get('status')!r}")
        return f"healthy, model {told.get('model_name') or 'not loaded'}"

    def _models(self) -> str:
        names = [str(one["id"]) for one in self._ask("GET", "/v1/models")["data"]]
        return f"{len(names)}: {', '.join(names[:3])}"

    def _info(self) -> str:
        info = self._client.model_info()
        return f"{info.model_name}, {info.parameters or 0:,} parameters on {info.device}"

    def _generate(self) -> str:
        return repr(self._client.generate("Once upon a time", **self._options).text)

    def _chat(self) -> str:
        return repr(self._client.chat("Say hello.", **self._options).text)

    def _stream(self) -> str:
        pieces = list(self._client.chat("Say hello.", stream=True, **self._options))
        return f"{len(pieces)} pieces: {''.join(pieces)!r}"

    def _completions(self) -> str:
        said = self._openai("/v1/completions", prompt="Once upon a time", max_tokens=TOKENS)
        return repr(said["choices"][0]["text"])

    def _chat_completions(self) -> str:
        turns: Messages = [{"role": "user", "content": "Say hello."}]
        said = self._openai("/v1/chat/completions", messages=turns, max_tokens=TOKENS)
        return repr(said["choices"][0]["message"]["content"])

    def _embeddings(self) -> str:
        said = self._openai("/v1/embeddings", input="hello")
        return f"{len(said['data'][0]['embedding'])} numbers"

    def _openai(self, path: str, **body: Any) -> Any:
        return self._ask("POST", path, {"model": self._named(), **body})

    def _named(self) -> str:
        """Which model the routes are asked of that want one."""
        if self._model is None:
            told = self._client.health_check().get("model_name")
            known = self._ask("GET", "/v1/models")["data"]
            names = [str(one["id"]) for one in known]
            self._model = next((one for one in names if one == told), next(iter(names), None))
        if self._model is None:
            raise ValueError("no model to ask: name one with --model")
        return self._model

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        from tuning_sdk.retry import Call

        return self._client.transport.send(Call(method, path, json=body, read_seconds=600))


def _chosen(only: str | None, known: list[str]) -> list[str]:
    """Raises CommandError for a name that is none."""
    if only is None or only.strip() == "all":
        return known
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    odd = [name for name in wanted if name not in known]
    if odd or not wanted:
        raise CommandError(
            f"--only {only!r}: there is no {odd[0] if odd else 'name in it'}",
            f"choose among {', '.join(known)}",
            USAGE,
        )
    return wanted


def _tried(name: str, call: Callable[[], str], is_asked_for: bool) -> Outcome:
    from tuning_sdk import TuningAPIError
    from tuning_sdk.errors import ConnectionError, NotReadyError, TimeoutError

    began = time.monotonic()
    state: State = "FAILED"
    try:
        told, state = call(), "ok"
    except (ConnectionError, TimeoutError) as error:
        told = str(error)
    except TuningAPIError as error:
        told = f"{error.status_code}: {error}" if error.status_code else str(error)
        if isinstance(error, NotReadyError) and _NO_MODEL in told and not is_asked_for:
            told, state = f"{_NO_MODEL}: name one with --model", "skipped"
    except (ValueError, KeyError, IndexError, TypeError) as error:
        told = f"not what the contract says: {error}"
    seconds = round(time.monotonic() - began, 3)
    is_long = state == "ok" and len(told) > _MAX_SHOWN
    short = f"{told[:_MAX_SHOWN]}…" if is_long else told
    return Outcome(name, state, seconds, " ".join(short.split()))

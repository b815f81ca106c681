"""The inference contract, told in OpenAI's words: requests translated, answers put back.

Imports no torch: the API speaks it before any engine, an engine of ours by itself.
"""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from tunesmith.data.built import instruction
from tunesmith.errors import BadRequestError
from tunesmith.infer.precision import Precision
from tunesmith.spec.chat import MAX_TEXT
from tunesmith.spec.strict import Strict

GENERATE = "/v1/completions"
CHAT = "/v1/chat/completions"
"""Where an engine answers what `/generate` and `/chat` ask."""
FIT = "x_fit_tokens"
"""In a body to an engine of ours: fewer than `max_tokens` are as good, where the context ends."""
PATHS = ("/generate", "/chat", "/model_info", "/load_model")
"""Their errors are `{"detail": …}`."""
_MOST = 2**31 - 1
_MANY = 1 << 20
"""More tokens, or more to draw from, than any model has."""
_MAX_FAULTS = 20
_LEAST = 1e-6
"""The top_p that keeps the likeliest token alone."""

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


def _as_list(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


class Options(Strict):
    """What both questions take."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_new_tokens: int = Field(256, ge=1, le=_MOST, strict=True)
    """Of the answer; where it is not given, fewer if the context ends before."""
    temperature: float = Field(0.7, ge=0, le=2, strict=True)
    """0 is greedy."""
    top_p: float = Field(0.9, ge=0, le=1, strict=True)
    """The likeliest tokens whose probability reaches it are drawn from."""
    do_sample: bool = Field(True, strict=True)
    """False takes the likeliest token each time."""
    model: str | None = Field(None, min_length=1, max_length=4096)
    """Another than the loaded one."""
    stop: Annotated[tuple[Stop, ...], Field(max_length=16), BeforeValidator(_as_list)] = ()
    """Texts that end the answer, before them; one, or a list."""
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, strict=True)
    """The same seed brings the same text."""
    stream: bool = Field(False, strict=True)
    """Answer with server-sent events, a token at a time."""

    def _sampling(self, model: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": min(self.max_new_tokens, _MANY),
            FIT: "max_new_tokens" not in self.model_fields_set,
            "temperature": self.temperature if self.do_sample else 0,
            "top_p": max(self.top_p, _LEAST),
            "stop": list(self.stop),
            "seed": self.seed,
            "stream": self.stream,
        }
        return body | {"stream_options": {"include_usage": True}} if self.stream else body


class Generate(Options):
    """`POST /generate`: a text to go on with."""

    prompt: Text
    """The text to go on with."""
    top_k: int = Field(50, ge=0, le=_MOST, strict=True)
    """So many of the likeliest tokens are drawn from; 0: all."""
    repetition_penalty: float = Field(1.1, gt=0, le=10, strict=True)
    """Above 1, what was said before is less likely."""
    num_return_sequences: int = Field(1, ge=1, le=16, strict=True)
    """Continuations of the one prompt."""

    def body(self, model: str) -> dict[str, Any]:
        return self._sampling(model) | {
            "prompt": self.prompt,
            "top_k": min(self.top_k, _MANY),
            "repetition_penalty": self.repetition_penalty,
            "n": self.num_return_sequences,
        }


class Turn(Strict):
    model_config = ConfigDict(use_attribute_docstrings=True)

    role: Literal["system", "user", "assistant"]
    """Who says it."""
    content: Text
    """What is said."""


class Chat(Options):
    """`POST /chat`: an instruction, or a conversation of several turns."""

    instruction: Text = ""
    """What to do."""
    input: Text = ""
    """What to do it with."""
    messages: tuple[Turn, ...] = Field((), max_length=2048)
    """In place of an instruction: a conversation of several turns."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if bool(self.messages) == bool(self.instruction):
            raise ValueError("give an instruction, or messages")
        if self.messages and self.input:
            raise ValueError("input belongs to an instruction; with messages, put it into them")
        return self

    def body(self, model: str) -> dict[str, Any]:
        turns = [turn.model_dump() for turn in self.messages]
        asked = instruction(self.instruction, self.input)
        return self._sampling(model) | {"messages": turns or [{"role": "user", "content": asked}]}


@dataclass
class Reply:
    """An engine's answer to one question, put into the contract's words as it comes."""

    asked: Generate | Chat
    model_name: str
    began: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> str:
        return GENERATE if isinstance(self.asked, Generate) else CHAT

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """From a completion's body."""
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        texts = [str(_text(choice, "message")) for choice in choices]
        return self._told(texts) | self._end(answer.get("usage"))

    async def frames(self, events: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
        """From a completion's server-sent events: one for each piece of text, then all of it."""
        count = self.asked.num_return_sequences if isinstance(self.asked, Generate) else 1
        texts: list[list[str]] = [[] for _ in range(count)]
        usage: Any = None
        async for event in _events(events):
            if event is None:
                yield _frame(self._told(["".join(each) for each in texts]) | self._end(usage))
                yield b"data: [DONE]\n\n"
                return
            if "error" in event:
                yield _frame(event)
                return
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                text, index = _text(choice, "delta"), int(choice["index"])
                finish = choice.get("finish_reason")
                if text or finish:
                    texts[index].append(text)
                    yield _frame({"index": index, "token": text, "finish_reason": finish})

    def _told(self, texts: Sequence[str]) -> dict[str, Any]:
        if isinstance(self.asked, Generate):
            prompt = self.asked.prompt
            return {"generated_text": [prompt + text for text in texts], "prompt": prompt}
        return {"response": texts[0], "instruction": self.asked.instruction}

    def _end(self, usage: Any) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.began, 4)
        return {"model_name": self.model_name, "generation_time": seconds, "usage": usage}


def _text(choice: dict[str, Any], part: str) -> str:
    said = choice["text"] if "text" in choice else choice.get(part, {}).get("content")
    return said or ""


async def _events(parts: AsyncIterable[bytes]) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The events of a stream; None is its proper end."""
    kept = b""
    async for part in parts:
        *whole, kept = (kept + part).split(b"\n\n")
        for each in whole:
            data = each.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                yield None
                return
            if each.startswith(b"data:"):
                yield json.loads(data)


def _frame(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def precision_of(load_in_8bit: bool, load_in_4bit: bool) -> Precision:
    """How weights are kept: `int8`, `int4`, or `auto`. Raises BadRequestError."""
    if load_in_8bit and load_in_4bit:
        raise BadRequestError("load_in_8bit and load_in_4bit exclude each other; choose one")
    return "int8" if load_in_8bit else "int4" if load_in_4bit else "auto"


def loaded(name: str, path: str) -> dict[str, str]:
    """The answer of `POST /load_model`."""
    told = f"the model {name!r} is loaded and serves"
    return {"status": "success", "message": told, "model_name": name, "model_path": path}


def faults(error: ValidationError) -> list[dict[str, Any]]:
    """What is wrong with a body, and where; never what was sent."""
    told = error.errors(include_url=False, include_context=False, include_input=False)
    return [{**each, "loc": ["body", *each["loc"]]} for each in told[:_MAX_FAULTS]]


def described(kind: type[Strict]) -> dict[str, Any]:
    """A body for the OpenAPI document of a route that reads it by itself."""
    schema = kind.model_json_schema()
    for definition in schema.pop("$defs", {}).values():  # the one of `messages`
        schema["properties"]["messages"]["items"] = definition
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}

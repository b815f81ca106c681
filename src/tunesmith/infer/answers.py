"""OpenAI's words for an answer: whole, or a chunk at a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.infer.calls import CallPart
from tunesmith.infer.chat import Piece
from tunesmith.infer.lexicon import Lexicon
from tunesmith.infer.logprobs import Said, chat_logprobs, completion_logprobs
from tunesmith.spec.chat import Delta


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, delta: Delta) -> None:
        self.completion_tokens += delta.token_id is not None

    def wire(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Choice:
    """One answer, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.delta.text)
        self.said += piece.said
        self.finish = piece.delta.finish
        for part in piece.calls:
            if part.id is not None:
                self.calls.append(_begun(part))
            else:
                self.calls[part.index]["function"]["arguments"] += part.arguments

    def message(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if not self.calls:
            return {"role": "assistant", "content": text, "refusal": None}
        content = text or None
        calls = self.calls
        return {"role": "assistant", "content": content, "refusal": None, "tool_calls": calls}


def _begun(part: CallPart) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": part.id, "type": "function", "function": function}


def _delta(piece: Piece) -> dict[str, Any]:
    """What a chat's chunk brings."""
    told: dict[str, Any] = {"content": piece.delta.text} if piece.delta.text else {}
    if piece.calls:
        told["tool_calls"] = [
            {"index": part.index, **_begun(part)}
            if part.id is not None
            else {"index": part.index, "function": {"arguments": part.arguments}}
            for part in piece.calls
        ]
    return told


@dataclass(frozen=True)
class Form:
    """One answer's envelope: its id, its time, and whether it is a chat or a plain completion."""

    id: str
    model: str
    is_chat: bool
    created: int
    lexicon: Lexicon | None = None
    """Where log-probabilities were asked for."""

    @classmethod
    def new(
        cls, request_id: str, model: str, is_chat: bool, lexicon: Lexicon | None = None
    ) -> "Form":
        prefix = "chatcmpl" if is_chat else "cmpl"
        return cls(f"{prefix}-{request_id}", model, is_chat, int(time.time()), lexicon)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        told = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._envelope(kind), "choices": told, "usage": usage.wire()}

    def first(self, index: int) -> dict[str, Any]:
        """A chat stream's opening chunk of a choice: the role."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, ())

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A chunk of a stream."""
        told = {"delta": _delta(piece)} if self.is_chat else {"text": piece.delta.text}
        return self._chunk(piece.index, told, piece.delta.finish, piece.said)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk that `include_usage` asks for, after the last choice."""
        return {**self._envelope(self._chunk_kind), "choices": [], "usage": usage.wire()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        told: dict[str, Any] = {"text": "".join(choice.texts)}
        if self.is_chat:
            told = {"message": choice.message()}
        return self._choice(index, told, choice.finish or "stop", choice.said)

    def _chunk(
        self, index: int, told: dict[str, Any], finish: str | None, said: Sequence[Said]
    ) -> dict[str, Any]:
        choice = self._choice(index, told, finish, said or None)
        return {**self._envelope(self._chunk_kind), "choices": [choice]}

    def _choice(
        self, index: int, told: dict[str, Any], finish: str | None, said: Sequence[Said] | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.lexicon is not None and said is not None:
            written = chat_logprobs if self.is_chat else completion_logprobs
            logprobs = written(said, self.lexicon)
        return {"index": index, **told, "finish_reason": finish, "logprobs": logprobs}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

"""Tools in one chat: how the answer is held to calling them, and how its calls are read."""

import secrets
import string
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from llguidance import LLMatcher

from tunesmith.errors import BadRequestError
from tunesmith.infer.calls import MAX_CALLS, CallReader
from tunesmith.infer.chat import Piece
from tunesmith.infer.dialects import HERMES, LLAMA, Dialect, dialect_of
from tunesmith.infer.guide import Grammar, compile_grammar
from tunesmith.infer.lexicon import Lexicon
from tunesmith.infer.schema import embedded, json_grammar
from tunesmith.infer.toolspec import Function, NamedChoice, Tool, ToolChoice
from tunesmith.infer.voices import Voice

_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Calling:
    """What an answer may call, and whether it has to."""

    dialect: Dialect
    tools: Sequence[Tool]
    callable: Sequence[Function]
    must: bool
    most: int

    @classmethod
    def of(
        cls, voice: Voice, tools: Sequence[Tool], choice: ToolChoice | None, is_parallel: bool
    ) -> "Calling | None":
        """None where no tool may be called. Raises BadRequestError where the model knows none."""
        if not tools or choice == "none":
            return None
        functions = [each.function for each in tools]
        if isinstance(choice, NamedChoice):
            functions = [each for each in functions if each.name == choice.function.name]
            is_parallel = False
        must = choice == "required" or isinstance(choice, NamedChoice)
        dialect = dialect_of(voice.renderer.tool_template)
        return cls(dialect, tools, functions, must, MAX_CALLS if is_parallel else 1)

    def marks(self, voice: Voice) -> dict[int, str]:
        """Tokens of the dialect that would have no text."""
        return self.dialect.marks(voice.renderer.tokenizer)

    def reader(self) -> CallReader:
        names = {each.name for each in self.callable}
        return CallReader(self.dialect, names, self._new_id, self.most)

    def _new_id(self) -> str:
        size = self.dialect.id_length
        letters = "".join(secrets.choice(_LETTERS) for _ in range(size))
        return letters if size < 10 else f"call_{letters}"

    @property
    def is_held(self) -> bool:
        """Whether a grammar is needed."""
        return self.must or any(each.strict for each in self.callable)

    def grammar(
        self, lexicon: Lexicon, marks: Mapping[int, str], answer: str | None = None
    ) -> Grammar:
        """`answer`: the schema of what is said where nothing is called; any text without one.

        Slow: call it off the event loop. Raises BadRequestError where a schema is wrong.
        """
        text = self._lark({text: id_ for id_, text in marks.items()}, answer)
        try:
            return compile_grammar(LLMatcher.grammar_from_lark(text), lexicon)
        except ValueError as error:
            for at, tool in enumerate(self.tools):
                if tool.function.parameters is not None:
                    param = f"tools.{at}.function.parameters"
                    is_strict = bool(tool.function.strict)
                    json_grammar(tool.function.parameters, param, lexicon, is_strict)
            raise BadRequestError(f"tools: {str(error)[:300]}", param="tools") from None

    def _lark(self, special: Mapping[str, int], answer: str | None) -> str:
        rules = [
            f"body{at}: {self._head(each, special)} %json {self._body(each)}"
            for at, each in enumerate(self.callable)
        ]
        rules.append("body: " + " | ".join(f"body{at}" for at in range(len(self.callable))))
        head, tail = self._calls(special, has_end=self.must or answer is not None)
        if self.must:
            return "\n".join([f"start: {head} {tail}", *rules])
        if answer is not None:
            rules += [f"called: {head} {tail}", f"answer: %json {answer}"]
            return "\n".join(["start: called | answer", *rules])
        if self.dialect is LLAMA:
            raise BadRequestError(
                "this model's calls begin with no mark, so strict cannot be held to while it may "
                "answer with text; leave strict out, or ask with tool_choice: required",
                param="tools",
            )
        times = "?" if self.most == 1 else "*"
        rules += [f"told: begun {tail}", *_begun(head), "TEXT: /(.|\\n)*/"]
        return "\n".join([f"start: told{times} rest", "rest: TEXT", *rules])

    def _calls(self, special: Mapping[str, int], has_end: bool) -> tuple[str, str]:
        """The opening mark, and what follows it to the end of the calls, or of the first where
        text may follow."""
        dialect = self.dialect
        opening, closing = (_quoted(mark, special) for mark in (dialect.opening, dialect.closing))
        if dialect is LLAMA:
            return "", "body" + self._more('"; " body')
        if dialect.name_end:
            return opening, "body" + (self._more(f"{opening} body") if has_end else "")
        if dialect is HERMES:
            one = f'"\\n" body "\\n" {closing}'
            return opening, one + (self._more(f'"\\n" {opening} {one}') if has_end else "")
        more = self._more('", " body')
        return opening, f'" "? "[" body{more} {closing}'

    def _more(self, call: str) -> str:
        return f" ({call}){{0,{self.most - 1}}}" if self.most > 1 else ""

    def _head(self, function: Function, special: Mapping[str, int]) -> str:
        """What stands before a call's object."""
        end = self.dialect.name_end
        return f"{_quoted(function.name, {})} {_quoted(end, special)}" if end else ""

    def _body(self, function: Function) -> str:
        arguments = _NOTHING if function.parameters is None else function.parameters
        if self.dialect.name_end:
            return embedded({"type": "object"} | arguments, bool(function.strict))
        shared = {key: each for key, each in arguments.items() if key in ("$defs", "definitions")}
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                self.dialect.arguments: {"type": "object"} | arguments,
            },
            "required": ["name", self.dialect.arguments],
            "additionalProperties": False,
            **shared,
        }
        return embedded(schema, bool(function.strict))


def _begun(opening: str) -> list[str]:
    """Text up to an opening mark, as a token or as letters."""
    if opening.startswith("<["):
        return [f"begun: TEXT {opening}"]
    return [f"begun[lazy]: TEXT {opening}"]


def _quoted(text: str, special: Mapping[str, int]) -> str:
    """A mark in a grammar: its token, where it is one of its own."""
    return f"<[{special[text]}]>" if text in special else msgspec.json.encode(text).decode()


async def called(
    pieces: AsyncGenerator[Piece, None], calling: Calling, count: int
) -> AsyncGenerator[Piece, None]:
    """The pieces of `count` sequences, their calls taken out of their texts."""
    readers = [calling.reader() for _ in range(count)]
    async with aclosing(pieces):
        async for piece in pieces:
            reader, delta = readers[piece.index], piece.delta
            text, parts = reader.push(delta.text)
            finish = delta.finish
            if finish is not None:
                more, rest = reader.flush()
                text, parts = text + more, [*parts, *rest]
                finish = "tool_calls" if reader.count and finish == "stop" else finish
            delta = delta.model_copy(update={"text": text, "finish": finish})
            yield replace(piece, delta=delta, calls=tuple(parts))

"""A conversation's text, cut where each answer begins and ends.

An answer begins where the generation prompt ends: the template is asked for the conversation up to
there, with the prompt, and that must be how the whole text begins. It ends after its end-of-turn
token. A template whose text of earlier turns changes as the conversation goes on ("rewrites
history") has no such places but for the last answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.data.row import Row
from tunesmith.data.sandbox import TemplateError
from tunesmith.data.templates import Rendered
from tunesmith.data.vocabulary import Vocabulary
from tunesmith.errors import ValidationError
from tunesmith.spec.chat import Message

Notice = Literal["last_answer_only", "generation_prompt_kept"]
NOTICES: Mapping[Notice, str] = {
    "last_answer_only": "the chat template writes earlier turns anew, so that only the last "
    "answer of each conversation is learnt",
    "generation_prompt_kept": "the chat template begins an answer in another way when it asks for "
    "one than when it shows one; what it asks with is what is trained on",
}
Tools = Sequence[dict[str, Any]]
Ranges = tuple[tuple[int, int], ...]
"""Of characters: from, to."""
Draw = Callable[[Sequence[Message], Tools, bool], Rendered]
"""The template: messages, tools, whether to end with the generation prompt."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised apart from what stands around it."""

    text: str
    is_answer: bool = False
    is_learnt: bool = False
    has_end: bool = True
    """An answer's end-of-turn token is in its text; else the end token is appended."""
    marks: Ranges | None = None
    """Where given: the only parts of it that are learnt."""
    is_first: bool = False
    """What the tokenizer puts before a text goes before it."""


@dataclass(frozen=True, slots=True)
class _Span:
    """An answer in the text of a whole conversation."""

    start: int
    end: int
    has_end: bool
    is_learnt: bool


class Cutter:
    def __init__(self, vocabulary: Vocabulary, draw: Draw) -> None:
        self._vocabulary, self._draw = vocabulary, draw

    def row(self, row: Row) -> tuple[list[Piece], Notice | None]:
        """Raises TemplateError where the template refuses it, ValidationError where nothing of
        it can be learnt.
        """
        whole = self._draw(row.messages, row.tools, False)
        spans = self._answers(row.messages, row.tools, whole.text)
        learnt = [at for at in _answers_in(row.messages) if _is_learnt(row.messages[at])]
        if learnt and all(at in spans for at in learnt):
            return _cut_up(whole.text, list(spans.values()), whole.marks), None
        if whole.marks:
            return self._marked(row.messages, whole), None
        if not learnt:
            raise ValidationError("no answer follows a message: nothing to learn")
        return self._last_answer(row, learnt[-1])

    def prompt(self, messages: Sequence[Message], tools: Tools) -> list[Piece]:
        """Up to the end of the generation prompt, answers of the history cut out as in `row`."""
        whole = self._draw(messages, tools, True)
        spans = self._answers(messages, tools, whole.text)
        if whole.marks and any(at not in spans for at in _answers_in(messages)):
            return self._marked(messages, whole)
        return _cut_up(whole.text, list(spans.values()), ())

    def end_of_turn(self) -> str:
        """The token that the template closes an answer with, or nothing."""
        asked, told = Message(role="user", content="a"), Message(role="assistant", content="b")
        try:
            start = len(self._draw([asked], (), True).text)
            body = self._draw([asked, told], (), False).text[start:]
        except TemplateError:
            return ""
        size, has_end = self._answer_size(body, "b")
        return self._vocabulary.token_at_end(body[:size]) if has_end else ""

    def _answers(self, messages: Sequence[Message], tools: Tools, whole: str) -> dict[int, _Span]:
        """Where each answer stands in `whole`, by its place in the conversation; those whose
        history reads otherwise when they are asked for are not in it.
        """
        found = {}
        for at in _answers_in(messages):
            try:
                span = self._answer(messages, at, tools, whole)
            except TemplateError:
                continue
            if span is not None:
                found[at] = span
        return found

    def _answer(
        self, messages: Sequence[Message], at: int, tools: Tools, whole: str
    ) -> _Span | None:
        asked = self._draw(messages[:at], tools, True).text
        if not whole.startswith(asked):
            return None
        shown = self._draw(messages[: at + 1], tools, False).text
        if not shown.startswith(asked):
            return None
        start = len(asked)
        size, has_end = self._answer_size(shown[start:], messages[at].content or "")
        end = start + size
        if not whole.startswith(shown[:end]):
            return None
        if not has_end and end == len(shown):
            end, has_end = self._late_end(whole, end)
        return _Span(start, end, has_end, _is_learnt(messages[at]))

    def _answer_size(self, body: str, content: str) -> tuple[int, bool]:
        """How much of the text from an answer's start is its own, and whether it is closed.

        The end-of-turn token is the one right after the content, else the last thing of all
        (calls of tools may stand between).
        """
        content = content.strip()
        place = body.find(content) if content else -1
        if place >= 0:
            rest = body[place + len(content) :].lstrip()
            token = self._vocabulary.token_at(rest, 0)
            if token in self._vocabulary.stop_tokens or (
                token and self._vocabulary.is_hollow(rest)
            ):
                return len(body) - len(rest) + len(token), True
        trimmed = body.rstrip()
        return len(trimmed), bool(self._vocabulary.token_at_end(trimmed))

    def _late_end(self, whole: str, end: int) -> tuple[int, bool]:
        """An end token that the template writes only once another turn follows."""
        for token in self._vocabulary.stop_tokens:
            if whole.startswith(token, end):
                return end + len(token), True
        return end, False

    def _last_answer(self, row: Row, at: int) -> tuple[list[Piece], Notice]:
        """Only the last answer, after its history as it is served."""
        asked = self._draw(row.messages[:at], row.tools, True).text
        shown = self._draw(row.messages[: at + 1], row.tools, False).text
        content = row.messages[at].content or ""
        is_kept = not shown.startswith(asked)
        start = shown.rfind(content.strip() or "\0") if is_kept else len(asked)
        if start < 0:
            raise ValidationError(
                "the chat template does not show the last answer as it is written, so what is to "
                "be learnt cannot be told from what is given"
            )
        size, has_end = self._answer_size(shown[start:], content)
        pieces = self.prompt(row.messages[:at], row.tools)
        pieces.append(Piece(shown[start : start + size], True, True, has_end))
        return pieces, "generation_prompt_kept" if is_kept else "last_answer_only"

    def _marked(self, messages: Sequence[Message], whole: Rendered) -> list[Piece]:
        """By the template's own marks, where asking and showing differ."""
        learnt = [_is_learnt(messages[at]) for at in _answers_in(messages)]
        is_paired = len(learnt) == len(whole.marks)
        spans = []
        for number, (start, end) in enumerate(whole.marks):
            size, has_end = self._answer_size(whole.text[start:end], "")
            end = start + size
            token = "" if has_end else self._vocabulary.token_at(whole.text, end)
            is_learnt = learnt[number] if is_paired else True
            spans.append(_Span(start, end + len(token), has_end or bool(token), is_learnt))
        return _cut_up(whole.text, spans, ())


def _cut_up(text: str, spans: list[_Span], marks: Ranges) -> list[Piece]:
    pieces, at = [], 0
    for span in spans:
        inside = tuple(
            (max(start, span.start) - span.start, min(end, span.end) - span.start)
            for start, end in marks
            if start < span.end and end > span.start
        )
        answer = text[span.start : span.end]
        pieces.append(Piece(text[at : span.start]))
        pieces.append(
            Piece(answer, True, span.is_learnt, span.has_end, marks=inside if marks else None)
        )
        at = span.end
    pieces.append(Piece(text[at:]))
    return [piece for piece in pieces if piece.text or piece.is_answer]


def _answers_in(messages: Sequence[Message]) -> list[int]:
    """Their places; one that opens the conversation answers nothing."""
    return [at for at, said in enumerate(messages) if said.role == "assistant" and at]


def _is_learnt(said: Message) -> bool:
    return said.weight != 0 and bool(said.content or said.tool_calls)

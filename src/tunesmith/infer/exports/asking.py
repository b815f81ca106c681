"""What a model says of a few fixed rows in the engine, to hold an export of it against."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tunesmith.data.parity import Rendered, adapter_facts, facts_of, rendered
from tunesmith.data.render import Renderer
from tunesmith.errors import ValidationError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.hearing import Ears
from tunesmith.infer.model import base_of
from tunesmith.infer.voices import renderer_of
from tunesmith.spec.chat import Message
from tunesmith.spec.parity import ANSWER_TOKENS, MAX_TOKENS, Spoken, Told, Witnessed

_TURNS = (
    ("What is the capital of France?", "Paris."),
    ("안녕하세요! 오늘 날씨가 어때요?", "맑고 따뜻해요."),
    ("请用一句话介绍你自己。", "我是一个助手。"),
    ("Write a haiku 🌊🌲", "waves 🌊 and night"),
    ("def add(a, b):\n    return a + b  # 1234567", "print(add(2, 3))\n"),
    ("I'll pay $3.50 — don't wait…  two  blanks", "OK, that's 3,50 €."),
    ("Ünïcödé, Ελληνικά, русский, العربية", "नमस्ते"),
    ("'s 't 're \t tab\n\nnew lines\r\n end ", "it's   done"),
)
TEXTS = tuple(text for turn in _TURNS for text in turn)


def asked(model: Path) -> Witnessed:
    """Of a full model or an adapter. Raises BadRequestError where the engine cannot serve it."""
    renderer, is_tuned = renderer_of(model), is_adapter(model)
    ears = Ears(base_of(model) if is_tuned else model)
    most = max(1, min(MAX_TOKENS, ears.context_length - ANSWER_TOKENS))
    rows = list(_rows(renderer, most))
    questions = [one.question for _, one in rows]
    with ears.loaded(model) as adapter:
        heard = ears.hear(adapter, [one.ids for _, one in rows], questions, ANSWER_TOKENS)
        longer = [[*ids, *own] for ids, own in zip(questions, heard.answers, strict=True)]
        again = ears.hear(adapter, longer, [], 1)
    facts = facts_of(ears.base) | adapter_facts(model) if is_tuned else facts_of(model)
    spoken = []
    for at, (row, one) in enumerate(rows):
        start = len(one.question) - 1
        spoken.append(
            Spoken(
                told=row,
                text_sha256=one.text_sha256,
                ids=tuple(one.ids),
                log_probs=tuple(heard.log_probs[at]),
                question=tuple(one.question),
                answer=tuple(heard.answers[at]),
                answer_log_probs=tuple(again.log_probs[at][start:]),
                margins=tuple(again.margins[at][start:]),
            )
        )
    stop_ids = tuple(sorted(renderer.stop_ids))
    return Witnessed(at=time.time(), stop_ids=stop_ids, facts=facts, spoken=tuple(spoken))


def _rows(renderer: Renderer, most: int) -> Iterator[tuple[Told, Rendered]]:
    """As conversations; those that the template or the context has no room for are left out."""
    for question, answer in _TURNS:
        messages = (
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
        row = Told(messages=messages)
        with suppress(ValidationError):
            yield row, rendered(renderer, row, most)

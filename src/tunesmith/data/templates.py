"""Chat templates: compiled once, rendered as transformers' `apply_chat_template` does.

A template comes with a model, so from a stranger: it runs in `sandbox`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2

from tunesmith.data.sandbox import Budget, Environment, TemplateError

MAX_TEMPLATE = 1 << 20
"""Characters of a template."""


@dataclass(frozen=True)
class Rendered:
    text: str
    marks: tuple[tuple[int, int], ...]
    """Character ranges inside {% generation %} blocks."""


class Template:
    """A compiled template; safe to use from several threads."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TemplateError(f"the chat template is longer than {MAX_TEMPLATE} characters")
        self.source = source
        self._environment = Environment()
        self._code = self._environment.prepared(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        constants: Mapping[str, Any],
        now: Callable[[], datetime] = datetime.now,
    ) -> Rendered:
        """Raises TemplateError, with the template's own words where it refuses the messages."""
        budget = Budget.of(messages, tools)
        words = dict(constants, messages=messages, tools=tools, documents=None)
        words["add_generation_prompt"] = add_generation_prompt
        words["strftime_now"] = lambda form: now().strftime(form)
        parts: list[str] = []
        self._environment.here.budget = budget
        try:
            for part in self._code.generate(words):
                budget.written += len(part)
                budget.fit(budget.written)
                parts.append(part)
        except TemplateError:
            raise
        except Exception as error:  # a stranger's code: whatever it raises is its fault
            raise TemplateError(_words_of(error)) from None
        finally:
            self._environment.here.budget = None
        return Rendered("".join(parts), tuple(budget.spans))


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """Raises TemplateError."""
    return Template(source)


def _words_of(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the chat template calls itself too deeply"
    text = str(error)[:500] or type(error).__name__
    if isinstance(error, jinja2.TemplateError) and not isinstance(error, jinja2.UndefinedError):
        return f"the chat template refuses these messages: {text}"
    return f"the chat template fails on these messages: {text}"

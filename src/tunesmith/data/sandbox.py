"""The jinja2 environment that a stranger's template runs in: plain data only, and a budget.

No file, no import, no attribute of Python. Whatever could grow without end is counted: loop turns
and macro calls by a tick that is put into the parsed template, strings and lists by a scale under
every operation that builds them, time by a look at the clock.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from tunesmith.errors import ValidationError

_SECONDS = 1.0
"""Of the thread's own CPU time, so that a busy machine refuses no honest template."""
_TURNS = 200_000
_TURNS_PER_MESSAGE = 500
_GROWTH = 8
_ROOM = 1 << 20
_MAX_BITS = 4096
_WIDTH = re.compile(r"\d{5,}")


class TemplateError(ValidationError):
    """A template that cannot be read, fails, or breaks its budget."""

    error_code = "chat_template"


@dataclass
class Budget:
    """What one rendering may use up."""

    turns: int
    size: int
    deadline: float
    done: int = 0
    written: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Any = (), tools: Any = ()) -> "Budget":
        """By the size of what is rendered."""
        return cls(
            turns=_TURNS + _TURNS_PER_MESSAGE * len(messages),
            size=_ROOM + _GROWTH * size_of((messages, tools)),
            deadline=time.thread_time() + _SECONDS,
        )

    def tick(self) -> None:
        self.done += 1
        if self.done > self.turns:
            raise TemplateError(f"the chat template makes more than {self.turns} loop turns")
        if not self.done % 64 and time.thread_time() > self.deadline:
            raise TemplateError(f"the chat template runs for more than {_SECONDS:g} s")

    def fit(self, size: int) -> None:
        if size > self.size:
            raise TemplateError(f"the chat template builds more than {self.size} characters")


class _Here(threading.local):
    budget: Budget | None = None


class Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
        )
        self.here = _Here()
        self.concat = self.joined  # type: ignore[method-assign]
        self.filters = {name: self._guarded(each) for name, each in self.filters.items()}
        self.filters["tojson"] = self._guarded(_to_json)
        self.globals.pop("lipsum", None)
        self.globals.update(dict=_Dict(), namespace=_Namespace, raise_exception=_raise)

    def prepared(self, source: str) -> jinja2.Template:
        try:
            tree = _Counted().visit(self.parse(source))
            code = self.compile(tree)
            return self.template_class.from_code(self, code, self.make_globals(None), None)
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
        except RecursionError:
            reason = "it is nested too deeply"
        except Exception as error:  # a stranger's code, folded at compile time
            reason = str(error)[:300]
        raise TemplateError(f"the chat template cannot be read: {reason}")

    @property
    def budget(self) -> Budget:
        return self.here.budget or Budget.of()

    def tick(self) -> str:
        self.budget.tick()
        return ""

    def joined(self, parts: Any) -> str:
        text = "".join(parts)
        self.budget.fit(len(text))
        return text

    def written(self, *parts: Any) -> str:
        """What `~` makes of its operands."""
        return self.joined([_plain_text(part) for part in parts])

    def weighed(self, value: Any) -> Any:
        """A list or dict of lists could double at every turn: its whole content is counted."""
        if isinstance(value, list | tuple | dict):
            self.budget.fit(size_of(value, self.budget.size))
        elif isinstance(value, str):
            self.budget.fit(len(value))
        return value

    def marked(self, caller: Callable[[], str]) -> str:
        budget, text = self.budget, caller()
        budget.spans.append((budget.written, budget.written + len(text)))
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if not _is_small(left, 1 << 32) or not _is_small(right, 64):
                raise TemplateError("the chat template computes too large a power")
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        return self.weighed(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        __self.tick()
        method = getattr(__obj, "__wrapped__", __obj)
        first = getattr(method, "__self__", None)
        __self._check_arguments((*args, *kwargs.values()))
        __self._check_named(getattr(method, "__name__", ""), first, (*args, *kwargs.values()))
        return __self.weighed(super().call(__context, __obj, *args, **kwargs))

    def _guarded(self, each: Callable[..., Any]) -> Callable[..., Any]:
        passed = getattr(each, "jinja_pass_arg", None) is not None

        @functools.wraps(each)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if passed else args
            self.tick()
            self._check_arguments((*given, *kwargs.values()))
            if given:
                self._check_named(each.__name__.removeprefix("do_"), given[0], given[1:])
            return self.weighed(each(*args, **kwargs))

        return guarded

    def _check_arguments(self, values: tuple[Any, ...]) -> None:
        for value in values:
            if isinstance(value, int) and abs(value) > self.budget.size:
                raise TemplateError("the chat template asks for a number that is too large")

    def _check_named(self, name: str, first: Any, rest: tuple[Any, ...]) -> None:
        """Functions whose result can be far larger than what they are given."""
        size = len(first) if isinstance(first, str) else size_of(first, self.budget.size)
        if name == "replace" and len(rest) > 1:
            self.budget.fit((size + 1) * max(1, len(str(rest[1]))))
        elif name == "join" and rest:
            count = _length(rest[0] if isinstance(first, str) and len(rest) == 1 else first)
            self.budget.fit(count * max(_length(first, 1), _length(rest[0], 1)))
        elif name in {"indent", "expandtabs"} and isinstance(first, str):
            lines = first.count("\n") + first.count("\t") + 1
            self.budget.fit(lines * max(map(_width, rest), default=8))
        elif name in {"format", "format_map"} and isinstance(first, str):
            self._check_format(first, rest)

    def _check_format(self, form: str, values: tuple[Any, ...]) -> None:
        if _WIDTH.search(form):
            raise TemplateError("the chat template asks for a field that is too wide")
        self._check_arguments(values)
        fields = form.count("%") + form.count("{")
        self.budget.fit(len(form) + fields * size_of(values, self.budget.size))

    def _check_product(self, left: Any, right: Any) -> None:
        for many, one in ((left, right), (right, left)):
            if isinstance(many, int) and isinstance(one, str | list | tuple):
                self.budget.fit(max(0, many) * len(one))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateError("the chat template computes too large a number")


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        assert isinstance(self.environment, Environment)
        return self.environment.marked(caller)


class _Counted(NodeTransformer):
    """Puts a tick into every loop and macro, and a scale under every list and every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _called("written", list(node.nodes), node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _weighed(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node, [pair.value for pair in node.items])


def _weighed(node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Expr:
    if all(isinstance(item, nodes.Const) for item in items):
        return node
    return _called("weighed", [node], node.lineno)


def _called(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(line)
    return call


def _tick(line: int) -> nodes.Node:
    return nodes.ExprStmt(_called("tick", [], line)).set_lineno(line)


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    return value


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        names = [name for name in dict(*args[1:], **kwargs) if isinstance(name, str)]
        if any(name.startswith("_") for name in names):
            raise jinja2.exceptions.SecurityError("a namespace takes no name that begins with _")
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace takes no name that begins with _")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON with every character as it is, where jinja2's own filter escapes HTML."""
    if _width(indent or 0) > 64:
        raise TemplateError("the chat template indents by more than 64")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _length(value: Any, unknown: int = 100_000) -> int:
    return len(value) if hasattr(value, "__len__") else unknown


def _width(value: Any) -> int:
    return value if isinstance(value, int) else _length(value, 1)


def _is_small(value: Any, limit: int) -> bool:
    return isinstance(value, int | float) and abs(value) <= limit


def size_of(value: Any, limit: int | None = None) -> int:
    """Characters and entries in nested data, counted until over `limit`."""
    waiting, size = [value], 0
    while waiting:
        each = waiting.pop()
        size += 1
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, Mapping):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        if limit is not None and size > limit:
            break
    return size

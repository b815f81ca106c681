"""YAML from outside, read without its dangers: plain mappings, lists, text, numbers.

The parser's events are counted while they come, and the values are built here, so nothing is
expanded before it is known to be small. Left out on purpose: aliases, anchors, tags, merge keys,
several documents. Scalars follow YAML 1.2's core schema: `2e-5` is a number, `on` and `no` are
text, and a number that is not finite is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tunesmith.errors import ValidationError

MAX_BYTES = 5 << 20
MAX_DEPTH = 16
MAX_NODES = 5000
_MAX_DIGITS = 100
_SMALL = 1 << 16
"""Characters that are read in a fifth of a second, whatever they are."""

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Events = Iterator[yaml.Event]
Path = tuple[str | int, ...]
"""Keys, and places in lists, from the outside in."""


@dataclass(frozen=True)
class Document:
    value: Any
    """None for an empty one."""
    lines: Mapping[Path, int]
    """Where each key, and each item of a list, stands; from 1."""


def load(text: str | bytes) -> Any:
    """The value of `read`'s document. Raises ValidationError."""
    return read(text).value


def read(text: str | bytes) -> Document:
    """The one document that stands there.

    Raises ValidationError with the line, for what is malformed, too large, or left out here.
    """
    try:
        content = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if len(content.encode()) > MAX_BYTES:
            raise _refusal(f"the document is over {MAX_BYTES} bytes")
    except UnicodeError:
        raise _refusal("the document is not UTF-8") from None
    try:
        return _Reading(_guarded(yaml.parse(content, Loader=_parser(content)))).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refusal(error.problem or error.context or "malformed", mark) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _refusal(" ".join(str(error).split())[:300]) from None


def _guarded(events: Events) -> Events:
    """The same events, as long as their number and depth keep within the limits."""
    nodes = depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases (*name) are not allowed; write the value out", event.start_mark)
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            _check_node(event)
        if nodes > MAX_NODES:
            raise _refusal(f"more than {MAX_NODES} values", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refusal(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        yield event


def _check_node(event: yaml.NodeEvent) -> None:
    if event.anchor is not None:
        raise _refusal("anchors (&name) are not allowed; write the value out", event.start_mark)
    if getattr(event, "tag", None) is not None:
        raise _refusal("tags (!name) are not allowed; write a plain value", event.start_mark)


class _Reading:
    """Builds values while events come. Recursion ends at MAX_DEPTH, which `_guarded` sees to."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._lines: dict[Path, int] = {}

    def document(self) -> Document:
        value = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _refusal("a second document begins; only one is read", event.start_mark)
                value = self._value(next(self._events), ())
        return Document(value, self._lines)

    def _value(self, event: yaml.Event, path: Path) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        assert isinstance(event, yaml.ScalarEvent)
        return _scalar(event)

    def _sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            place = (*path, len(items))
            self._lines[place] = _line(event)
            items.append(self._value(event, place))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _refusal("a key has to be plain text", event.start_mark)
            key = _text(event)
            if key == "<<":
                raise _refusal("merge keys (<<) are not allowed", event.start_mark)
            if key in found:
                raise _refusal(f"{key!r} is given twice", event.start_mark)
            self._lines[*path, key] = _line(event)
            found[key] = self._value(next(self._events), (*path, key))
        return found


def _parser(content: str) -> Any:
    """libyaml reads a hundred times as fast, and tabs; the other knows the surrogates of JSON."""
    is_plain = len(content) <= _SMALL and "\t" not in content
    return yaml.SafeLoader if is_plain else getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _line(event: yaml.Event) -> int:
    mark = event.start_mark
    assert mark is not None
    return int(mark.line) + 1


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = _text(event)
    if event.style:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        _check_length(text, event)
        return int(text) if text[:2] not in {"0x", "0o"} else int(text, 0)
    if _FLOAT.fullmatch(text):
        _check_length(text, event)
        number = float(text)
        if not math.isfinite(number):
            raise _refusal(f"{text} is too large for a number", event.start_mark)
        return number
    if _NOT_FINITE.fullmatch(text):
        raise _refusal(f"{text} is not a finite number", event.start_mark)
    return text


def _check_length(text: str, event: yaml.ScalarEvent) -> None:
    if len(text) > _MAX_DIGITS:
        raise _refusal("a number with too many digits", event.start_mark)


def _text(event: yaml.ScalarEvent) -> str:
    """Pairs of escaped surrogates, as JSON writes an emoji, become the one character."""
    try:
        return str(event.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refusal(
            "half of a surrogate pair; write the character itself", event.start_mark
        ) from None


def _refusal(message: str, mark: Any = None) -> ValidationError:
    if mark is None:
        return ValidationError(f"YAML: {message}", details=[{"loc": [], "msg": message}])
    line = mark.line + 1
    place = f"line {line}, column {mark.column + 1}"
    return ValidationError(
        f"YAML, {place}: {message}", details=[{"loc": ["line", line], "msg": message}]
    )

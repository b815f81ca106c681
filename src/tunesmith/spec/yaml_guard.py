"""YAML from outside, read without its dangers: plain mappings, lists, text, numbers.

The parser's events are counted while they come, and the values are built here, so nothing is
expanded before it is known to be small. Left out on purpose: aliases, anchors, tags, merge keys,
several documents. Scalars follow YAML 1.2's core schema: `2e-5` is a number, `on` and `no` are
text, and a number that is not finite is refused.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tunesmith.errors import ValidationError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_NODES = 5000
_MAX_DIGITS = 100

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Events = Iterator[yaml.Event]


def load(text: str | bytes) -> Any:
    """The one document's value; None for an empty one.

    Raises ValidationError with the line, for what is malformed, too large, or left out here.
    """
    try:
        content = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if len(content.encode()) > MAX_BYTES:
            raise _refusal(f"the document is over {MAX_BYTES} bytes")
    except UnicodeError:
        raise _refusal("the document is not UTF-8") from None
    try:
        return _document(_guarded(yaml.parse(content, Loader=yaml.SafeLoader)))
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


def _document(events: Events) -> Any:
    value = None
    documents = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _refusal("a second document begins; only one is read", event.start_mark)
            value = _value(next(events), events)
    return value


def _value(event: yaml.Event, events: Events) -> Any:
    """Recursion ends at MAX_DEPTH, which `_guarded` sees to."""
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_value(item, events))
        return items
    assert isinstance(event, yaml.ScalarEvent)
    return _scalar(event)


def _mapping(events: Events) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise _refusal("a key has to be plain text", event.start_mark)
        key = _text(event)
        if key == "<<":
            raise _refusal("merge keys (<<) are not allowed", event.start_mark)
        if key in found:
            raise _refusal(f"{key!r} is given twice", event.start_mark)
        found[key] = _value(next(events), events)
    return found


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = _text(event)
    if event.style is not None:
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

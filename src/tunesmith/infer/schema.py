"""A JSON Schema of a request, checked, as a grammar."""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec
from jsonschema import Draft202012Validator, SchemaError
from llguidance import LLMatcher

from tunesmith.errors import BadRequestError
from tunesmith.infer.guide import Grammar, compile_grammar
from tunesmith.infer.lexicon import Lexicon

MAX_BYTES = 128 << 10
MAX_NODES = 4000
BLANKS = r"( |\n[ \t]{0,64})?"
"""Between the parts of a JSON text: without a bound, a model may say nothing else for ever."""


def json_grammar(
    schema: dict[str, Any], param: str, lexicon: Lexicon, is_strict: bool = True
) -> Grammar:
    """Where it is not strict, keywords that cannot be followed are passed over.

    Slow: call it off the event loop. Raises BadRequestError that says where the schema is wrong.
    """
    text = written(schema, param, is_strict)
    try:
        return compile_grammar(text, lexicon)
    except ValueError as error:
        _refuse(_explained(str(error), schema), param)


def written(schema: dict[str, Any], param: str, is_strict: bool = True) -> str:
    """A schema of sane size in llguidance's own form, not compiled yet."""
    text = msgspec.json.encode(schema).decode()
    if len(text) > MAX_BYTES or sum(1 for _ in _nodes(schema)) > MAX_NODES:
        _refuse(f"at most {MAX_BYTES} bytes and {MAX_NODES} values are read", param)
    options: Any = {"whitespace_pattern": BLANKS, "lenient": not is_strict}
    return str(LLMatcher.grammar_from_json_schema(text, overrides=options))


def embedded(schema: dict[str, Any], is_strict: bool) -> str:
    """A schema as a part of a larger grammar."""
    options = {"whitespace_pattern": BLANKS, "lenient": not is_strict}
    return msgspec.json.encode({**schema, "x-guidance": options}).decode()


def _explained(reason: str, schema: Any) -> str:
    """What is wrong and where: by the standard's own schema, else what llguidance names, looked
    up in the schema."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message[:300]}"
    except RecursionError:
        return "it nests too deep"
    lines = [line.strip(" ^") for line in reason.splitlines()]
    shown = " ".join(filter(None, lines))[:300]
    names = {*re.findall(r'"([^"]+)"', shown), shown.rpartition(": ")[2], *lines}
    places = (path for path, *told in _nodes(schema) if not names.isdisjoint(told))
    where = next(places, None)
    return f"{where}: {shown}" if where else shown


def _nodes(schema: Any) -> Iterator[tuple[str, str | None, str | None]]:
    """Every value in it: its path, its key, and itself where it is a text."""
    left: list[tuple[str, str | None, Any]] = [("$", None, schema)]
    while left:
        path, key, value = left.pop()
        yield path, key, value if isinstance(value, str) else None
        if isinstance(value, dict):
            left += [(f"{path}.{name}", name, each) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{path}[{at}]", None, each) for at, each in enumerate(value)]


def _refuse(reason: str, param: str) -> NoReturn:
    raise BadRequestError(f"{param}: {reason}", param=param, error_code="invalid_schema")

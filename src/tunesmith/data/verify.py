"""Whether an answer holds by a rule: its last number, a pattern, a JSON schema.

Pattern and schema come from a user, the answer from a model in training: each look is bounded, by
time where a pattern is matched, by a count of keywords where a schema is walked.
"""

import ast
import itertools
import json
import math
import re
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.exceptions import ValidationError as Mismatch
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from tunesmith.data import pattern_child
from tunesmith.errors import ValidationError
from tunesmith.spec.rewards import JsonSchema, PythonFunction, Regex, RewardSource

SECONDS = 1.0
"""For one match."""
MOST_KEYWORDS = 20_000
"""Looked at for one answer."""
_CHILD_SECONDS = 60
"""For patterns to be compiled, on a host that is busy."""
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3})?"
)
_REFUSED = frozenset(
    ("patternProperties", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef")
)
_OF_NAMES = frozenset(("properties", "$defs", "definitions", "dependentSchemas"))
_NO_SCHEMA = frozenset(("enum", "const", "default", "examples"))


def last_number(text: str) -> float | None:
    """The last one that is written in digits, 1,234.5 and ３ among them; None where there is none.

    A sign counts where it does not follow a letter or digit.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    found = None
    for match in _NUMBER.finditer(plain):
        found = match
    if found is None:
        return None
    value = float(found.group().replace(",", ""))
    return value if math.isfinite(value) else None


class Pattern:
    def __init__(self, text: str) -> None:
        """Raises ValidationError where it is no pattern, or too large a one."""
        check_patterns((text,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._pattern = regex.compile(text)

    def is_in(self, text: str) -> bool:
        """Raises TimeoutError where it takes longer than `SECONDS`."""
        return self._pattern.search(text, timeout=SECONDS) is not None


@lru_cache(maxsize=64)
def check_patterns(texts: tuple[str, ...]) -> None:
    """Compiles them elsewhere first. Raises ValidationError where one is none, or too large."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-B", "-X", "utf8", pattern_child.__file__],
            input=json.dumps(texts).encode(),
            capture_output=True,
            timeout=_CHILD_SECONDS,
        )
        is_over = child.returncode != 0
    except subprocess.TimeoutExpired:
        is_over = True
    if is_over:
        raise ValidationError(
            "the pattern is too large: counts within counts multiply, as in (a{1000}){1000}"
        )
    if child.stdout:
        told = child.stdout.decode(errors="replace").strip()
        raise ValidationError(f"the pattern cannot be read: {told[:300]}")


class Schema:
    """A JSON schema of draft 2020-12, without what looks elsewhere or cannot be bounded."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Raises ValidationError with what is wrong in it."""
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            raise ValidationError(f"the schema is none, at {where!r}: {error.message}") from None
        except RecursionError:
            raise ValidationError("the schema is nested too deeply") from None
        self._budget = _Budget()
        known = {
            name: _counted(function, self._budget)
            for name, function in {**Draft202012Validator.VALIDATORS, **_OURS}.items()
        }
        kind = extend(Draft202012Validator, known)
        self._validator = kind(schema, registry=Registry())
        try:
            _check_keywords(schema)
        except RecursionError:
            raise ValidationError("the schema is nested too deeply") from None

    def holds(self, text: str) -> bool:
        """Whether the text is JSON that the schema allows. What takes too long to tell, is not."""
        self._budget.left = MOST_KEYWORDS
        try:
            return bool(self._validator.is_valid(json.loads(text, parse_constant=_refuse)))
        except (ValueError, RecursionError, ArithmeticError, _Spent):
            return False


def check_rules(sources: Iterable[RewardSource]) -> None:
    """Raises ValidationError where a pattern, a schema, a code of them is none."""
    for source in sources:
        if isinstance(source, Regex):
            Pattern(source.pattern)
        if isinstance(source, JsonSchema):
            Schema(source.json_schema)
        if isinstance(source, PythonFunction):
            _check_code(source.code)


def _check_code(code: str) -> None:
    """It is read here, and run nowhere but in `confined`. Raises ValidationError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError as error:
        where = f"the code, line {error.lineno}" if error.lineno else "the code"
        raise ValidationError(f"{where}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValidationError("the code cannot be read as Python") from None


class _Spent(Exception):
    pass


@dataclass
class _Budget:
    left: int = MOST_KEYWORDS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Spent


def _counted(function: Callable[..., Any], budget: _Budget) -> Callable[..., Iterator[Any]]:
    def keyword(*given: Any) -> Iterator[Any]:
        budget.take()
        yield from function(*given) or ()

    return keyword


def _matches(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Mismatch]:
    if not validator.is_type(instance, "string"):
        return
    try:
        is_in = regex.search(pattern, instance, timeout=SECONDS) is not None
    except TimeoutError:
        raise _Spent from None
    except regex.error:
        is_in = False
    if not is_in:
        yield Mismatch("does not match")


def _differ(validator: Any, is_asked: bool, instance: Any, schema: Any) -> Iterator[Mismatch]:
    """As many steps as there are items; the library's compares each with each."""
    if not is_asked or not validator.is_type(instance, "array"):
        return
    if len({json.dumps(_alike(one), sort_keys=True) for one in instance}) < len(instance):
        yield Mismatch("holds an item twice")


def _alike(value: Any) -> Any:
    """1 and 1.0 are one value in a schema's eyes."""
    if isinstance(value, list):
        return [_alike(one) for one in value]
    if isinstance(value, dict):
        return {name: _alike(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


_OURS: Mapping[str, Callable[..., Iterator[Mismatch]]] = {
    "pattern": _matches,
    "uniqueItems": _differ,
}


def _check_keywords(schema: Any) -> None:
    """Raises ValidationError for what is not looked at here, and for what leads nowhere."""
    here = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver("")
    patterns = [value for word, value in _keywords(schema) if word == "pattern"]
    if patterns:
        check_patterns(tuple(map(str, patterns)))
    references: set[str] = set()
    for word, value in _keywords(schema):
        if word in _REFUSED:
            raise ValidationError(f"the schema's {word} is not looked at here; say it otherwise")
        if word == "$ref" and not str(value).startswith("#"):
            raise ValidationError(
                f"the schema's $ref {str(value)[:80]!r} leads elsewhere; give it within, by #/…"
            )
        if word == "$ref":
            references.add(str(value))
    for reference in references:
        if not _leads_to_a_schema(here, reference):
            raise ValidationError(f"the schema's $ref {reference[:80]!r} leads nowhere")


def _leads_to_a_schema(here: Any, reference: str) -> bool:
    """And not into what no other look was taken at: a value, such as that of `const`."""
    steps = ["", *unquote(reference).split("/")]
    if any(
        word in _NO_SCHEMA and before not in _OF_NAMES for before, word in itertools.pairwise(steps)
    ):
        return False
    try:
        found = here.lookup(reference).contents
        Draft202012Validator.check_schema(found)
    except (Unresolvable, ValueError, TypeError, LookupError, SchemaError):
        return False
    return True


def _keywords(schema: Any, is_of_names: bool = False) -> Iterator[tuple[str, Any]]:
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from _keywords(one)
    if not isinstance(schema, Mapping):
        return
    for word, value in schema.items():
        if is_of_names:
            yield from _keywords(value)
            continue
        yield word, value
        if word not in _NO_SCHEMA:
            yield from _keywords(value, word in _OF_NAMES)


def _refuse(word: str) -> None:
    raise ValueError(word)

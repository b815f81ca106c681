"""YAML from outside: what is read, what is refused, and that no bomb goes off."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import ValidationError
from tunesmith.spec.yaml_guard import MAX_BYTES, MAX_DEPTH, MAX_NODES, load, read

MERGE_BOMB = "\n".join(
    ["a0: &a0 {k: 1}"]
    + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
)
ALIAS_BOMB = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
)


@pytest.mark.parametrize(
    ("bomb", "why"),
    [
        ("[" * 50_000, "deep"),
        ("{a: " * 50_000, "deep"),
        ("- " * 50_000, "deep"),
        (MERGE_BOMB, "anchors"),
        (ALIAS_BOMB, "anchors"),
        ("x: *nowhere", "aliases"),
        ("[" + "1," * (MAX_NODES + 1) + "]", "more than 5000"),
        ("a: !!python/object/apply:os.system [id]", "tags"),
        ("a: !!int 5", "tags"),
        ("<<: {a: 1}", "merge"),
        ("a: 1\n---\nb: 2", "second document"),
        ("x" * (MAX_BYTES + 1), "over"),
        ("a: 1\na: 2", "twice"),
        ("? [a]\n: 1", "plain text"),
        ("a: .nan", "finite"),
        ("a: -.inf", "finite"),
        ("a: 1e999", "too large"),
        ("a: " + "9" * 5000, "digits"),
        ('a: "\\ud800"', "surrogate"),
        ('a: "\\U00110000"', ""),
        ("a: [1", "expected"),
        ("a: b: c", "not allowed here"),
        ("a: \x00", ""),
        (b"\xff\xfea\x00", "UTF-8"),
        (b"a: \xc3\x28", "UTF-8"),
        ("\t- x", ""),
        ("%YAML 9.9\n---\na", ""),
    ],
)
def test_what_is_dangerous_is_refused_with_a_reason(bomb: str | bytes, why: str) -> None:
    with pytest.raises(ValidationError) as caught:
        load(bomb)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 500


LONG = "#" * (1 << 16) + "\n"
"""Before a document: then libyaml reads it."""


@pytest.mark.parametrize(
    ("bomb", "why"),
    [
        ("[" * 50_000, "deep"),
        ("{a: " * 50_000, "deep"),
        (MERGE_BOMB, "anchors"),
        (ALIAS_BOMB, "anchors"),
        ("x: *nowhere", "aliases"),
        ("[" + "1," * (MAX_NODES + 1) + "]", "more than 5000"),
        ("a: !!python/object/apply:os.system [id]", "tags"),
        ("<<: {a: 1}", "merge"),
        ("a: 1\n---\nb: 2", "second document"),
        ("a: 1\na: 2", "twice"),
        ("a: [1", ""),
        ("a: b: c", ""),
        ("a: \x00", ""),
        ("\t- x", ""),
        ("a: " + "'" * (MAX_BYTES - (1 << 17) + 1), ""),
    ],
)
def test_a_long_document_is_guarded_the_same(bomb: str, why: str) -> None:
    with pytest.raises(ValidationError) as caught:
        load(LONG + bomb)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("before", ["", LONG])
def test_every_key_and_item_has_its_line(before: str) -> None:
    found = read(before + "a: 1\nb:\n  - x\n  - c: '2e-5'\n    d: {e: 2e-5}\n")
    first = 2 if before else 1
    assert found.value == {"a": 1, "b": ["x", {"c": "2e-5", "d": {"e": 2e-5}}]}
    assert {path: line - first for path, line in found.lines.items()} == {
        ("a",): 0,
        ("b",): 1,
        ("b", 0): 2,
        ("b", 1): 3,
        ("b", 1, "c"): 3,
        ("b", 1, "d"): 4,
        ("b", 1, "d", "e"): 4,
    }


def test_a_fault_names_its_line() -> None:
    with pytest.raises(ValidationError, match="line 3, column 4") as caught:
        load("a: 1\nb: 2\nc: *x\n")
    assert caught.value.details[0]["loc"] == ["line", 3]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate: 2e-5", {"learning_rate": 2e-5}),
        ("[1, -7, +3, 0x1F, 0o17, 007]", [1, -7, 3, 31, 15, 7]),
        ("[1.5, .5, 5., 1E3, -2e+2]", [1.5, 0.5, 5.0, 1000.0, -200.0]),
        ("[true, False, null, ~, ]", [True, False, None, None]),
        ("[on, off, yes, no, y]", ["on", "off", "yes", "no", "y"]),
        ("['1', \"2e-5\", 'null']", ["1", "2e-5", "null"]),
        ("[2026-01-01, 1:30, 1_000, 1.2.3]", ["2026-01-01", "1:30", "1_000", "1.2.3"]),
        ("한국어: 中文 🎉", {"한국어": "中文 🎉"}),
        ("a:\n  - b: |\n      두 줄\n      二行\n", {"a": [{"b": "두 줄\n二行\n"}]}),
        ("1: x\ntrue: y", {"1": "x", "true": "y"}),
        ("", None),
        ("# only a remark", None),
        ("a:", {"a": None}),
        (b"\xef\xbb\xbfa: 1", {"a": 1}),
        ("---\na: 1\n...\n", {"a": 1}),
        ('{\n\t"a":\t[1,\t2]\n}', {"a": [1, 2]}),
    ],
)
def test_plain_values_are_read(text: str | bytes, value: Any) -> None:
    assert load(text) == value


def test_the_deepest_allowed_is_read_and_one_more_is_not() -> None:
    assert load("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValidationError):
        load("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8).filter(lambda key: key != "<<"), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(PLAIN)
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read_again(value: Any) -> None:
    """JSON is YAML: numbers, texts and nesting come back as they were."""
    import json

    found = load(json.dumps(value))
    assert found == value or _close(found, value)


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_value_or_a_refusal(text: str | bytes) -> None:
    try:
        load(text)
    except ValidationError:
        return


def _close(found: Any, value: Any) -> bool:
    if isinstance(value, float) and isinstance(found, int | float):
        return math.isclose(found, value, rel_tol=1e-12)
    if isinstance(value, list):
        return len(found) == len(value) and all(map(_close, found, value))
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(_close(found[k], value[k]) for k in value)
    return bool(found == value)


def test_the_library_below_still_needs_the_guard() -> None:
    """Why 2e-5 is read here and not there."""
    assert yaml.safe_load("2e-5") == "2e-5"

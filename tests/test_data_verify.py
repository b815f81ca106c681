"""Answers that hold by a rule, and rules and answers that mean harm."""

import json

import pytest

from tunesmith.data import verify
from tunesmith.data.verify import Pattern, Schema, last_number
from tunesmith.errors import ValidationError

SLOW = r"(a|aa)+$"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("#### 1,234.5 dollars", 1234.5),
        ("답은 -3입니다", -3),
        ("答案是３．５", 3.5),
        ("\N{MINUS SIGN}7", -7),
        ("5-3", 3),
        ("x = -2.5e2", -250),
        ("1, 2 and 3", 3),
        ("version v2 of b4", None),
        ("1e999", None),
        ("none", None),
    ],
)
def test_the_last_number_is_read_in_any_script(text, number):
    assert last_number(text) == number


SHAPE = {
    "type": "object",
    "required": ["a"],
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/word"}},
    "$defs": {"word": {"type": "string", "pattern": "^[가-힣]+$"}},
}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (' {"a": 1}\n', True),
        ('{"a": 1, "b": "물"}', True),
        ('{"a": 1, "b": "x"}', False),
        ('{"a": 1.5}', False),
        ("{}", False),
        ('{"a": NaN}', False),
        ("a", False),
        ("[" * 100_000, False),
    ],
)
def test_json_holds_where_the_schema_allows_it(text, is_right):
    assert Schema(SHAPE).holds(text) is is_right


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "text"}, "none, at 'type'"),
        ({"pattern": "("}, "none, at 'pattern'"),
        ({"$ref": "http://127.0.0.1/a"}, "leads elsewhere"),
        ({"anyOf": [{"$ref": "#/$defs/none"}]}, "leads nowhere"),
        ({"prefixItems": [{}], "$ref": "#/prefixItems/x"}, "leads nowhere"),
        ({"$ref": "#/a", "a": 5}, "leads nowhere"),
        ({"$ref": "#/a", "a": {"type": 5}}, "leads nowhere"),
        ({"$ref": "#/%63onst", "const": {"$ref": "http://127.0.0.1/"}}, "leads nowhere"),
        ({"items": {"pattern": "((a{1000}){1000}){1000}"}}, "too large"),
        ({"properties": {"a": {"patternProperties": {}}}}, "patternProperties is not looked at"),
    ],
)
def test_a_schema_that_cannot_be_bounded_or_leads_away_is_refused(schema, why):
    with pytest.raises(ValidationError, match=why):
        Schema(schema)


def test_a_schema_may_have_a_property_of_any_name():
    assert Schema({"$defs": {"default": {"const": 1}}, "$ref": "#/$defs/default"}).holds("1")
    assert Schema({"properties": {"$ref": {"enum": ["patternProperties"]}}}).holds("{}")


def test_schemas_that_grow_or_go_round_end(monkeypatch):
    monkeypatch.setattr(verify, "SECONDS", 0.05)
    deep = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 3} for at in range(20)}
    assert not Schema({"$defs": deep | {"d20": {}}, "$ref": "#/$defs/d0"}).holds("1")
    assert not Schema({"$ref": "#"}).holds("1")
    assert not Schema({"pattern": SLOW}).holds(f'"{"a" * 60}!"')


def test_a_match_that_takes_too_long_is_broken_off(monkeypatch):
    monkeypatch.setattr(verify, "SECONDS", 0.05)
    assert Pattern(r"(?i)Answer:\s*\d+").is_in("the answer: 4")
    with pytest.raises(TimeoutError):
        Pattern(SLOW).is_in("a" * 60 + "!")
    with pytest.raises(ValidationError, match="cannot be read"):
        Pattern("(")


@pytest.mark.parametrize(
    "pattern", ["((((a{1000}){1000}){1000}){1000})", "(?:(?:ab){999,}){999,}" * 9]
)
def test_counts_within_counts_cost_this_process_nothing(pattern):
    with pytest.raises(ValidationError, match="too large"):
        Pattern(pattern)


@pytest.mark.parametrize(
    ("items", "is_right"),
    [("[1, 1.0]", False), ("[true, 1]", True), ('[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', False)],
)
def test_items_that_differ_are_told_apart_in_one_walk(items, is_right):
    assert Schema({"uniqueItems": True}).holds(items) is is_right
    many = json.dumps([{"a": at} for at in range(20_000)])
    assert Schema({"uniqueItems": True}).holds(many)

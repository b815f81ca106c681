"""What a row of each kind asks, and what it says should be answered."""

import json

import pytest

from tunesmith.data.asked import asked
from tunesmith.data.formats import detect, parse

USER = {"role": "user", "content": "2 + 2?"}
TOLD = {"role": "assistant", "content": "4"}


def read(row):
    return parse(json.dumps(row).encode(), detect(row), 1)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"messages": [USER]}, None),
        ({"messages": [USER], "answer": 4}, "4"),
        ({"messages": [USER, TOLD]}, "4"),
        ({"prompt": [USER], "reference": "four"}, "four"),
        ({"prompt": [USER], "chosen": [TOLD], "rejected": [TOLD | {"content": "5"}]}, "4"),
        ({"instruction": "2 + 2?", "output": "4"}, "4"),
    ],
)
def test_a_conversation_is_asked_up_to_its_last_answer(row, reference):
    found = asked(read(row))
    assert found.plain == [USER]
    assert (found.prompt, found.reference) == (None, reference)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "2 + 2?"}, None),
        ({"prompt": "2 + 2?", "reference": "4"}, "4"),
        ({"prompt": "2 + 2?", "completion": "4"}, "4"),
        ({"prompt": "2 + 2?", "responses": [{"content": c, "score": int(c)} for c in "34"]}, "4"),
    ],
)
def test_a_raw_prompt_is_asked_as_it_stands(row, reference):
    found = asked(read(row))
    assert (found.prompt, found.messages, found.reference) == ("2 + 2?", (), reference)
    assert found.plain == [USER]


def test_a_conversation_of_several_turns_asks_with_the_answers_before():
    row = {"messages": [USER, TOLD, USER], "reference": "still 4"}
    assert asked(read(row)).plain == [USER, TOLD, USER]


def test_a_row_of_prompts_may_hold_its_reference_as_an_answer():
    found = asked(parse(json.dumps({"messages": [USER, TOLD]}).encode(), "prompts", 1))
    assert (found.plain, found.reference) == ([USER], "4")

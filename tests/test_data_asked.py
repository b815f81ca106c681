"""What a row of each kind asks, and what it says should be answered."""

import json

import pytest

from data_fixtures import FAMILIES
from tunesmith.data.asked import AskedRows, asked
from tunesmith.data.check import check_tokens
from tunesmith.data.formats import detect, parse
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex

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


def test_rows_are_checked_by_what_they_ask(tmp_path):
    long = {"role": "assistant", "content": "word " * 400}
    rows = [{"messages": [USER, long]}, {"messages": [USER | {"content": "word " * 400}, TOLD]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer.load(FAMILIES[0].write(tmp_path / "model"))
    with RowIndex.open(path) as index:
        verdict = check_tokens(AskedRows(index), renderer, 200)
    assert (verdict.overlong_lines, verdict.masked_count, verdict.failure) == ((2,), 0, None)

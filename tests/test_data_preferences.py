"""Answers that were judged: how pairs and single ones are read, checked and matched to methods."""

import json

import pytest

from data_fixtures import FAMILIES, PLAIN
from tunesmith.data.check import check_tokens
from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowFault, RowIndex, check_file
from tunesmith.data.suited import READ, refuse_unsuited
from tunesmith.errors import ValidationError

ASKED = [{"role": "user", "content": "밤?"}]


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def rows(tmp_path):
    def write(*found):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
        return RowIndex.open(path)

    return write


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    family = next(each for each in FAMILIES if each.name == "chatml")
    return Renderer.load(family.write(tmp_path_factory.mktemp("model") / "chatml"))


def talk(row):
    return [(said.role, said.content, said.weight) for said in row.messages]


def test_a_pair_of_texts_is_two_rows_with_one_prompt(rows):
    row = rows({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5})[0]
    assert (row.prompt, row.completion, row.margin) == ("a", "b", 1.5)
    assert (row.rejected.prompt, row.rejected.completion) == ("a", "c")


def test_answers_in_the_prompt_are_context_only(rows):
    history = [*ASKED, said("어제"), *ASKED]
    row = rows({"prompt": history, "chosen": [said("good")], "rejected": [said("bad")]})[0]
    shown = [("user", "밤?", None), ("assistant", "어제", 0), ("user", "밤?", None)]
    assert talk(row) == [*shown, ("assistant", "good", None)]
    assert talk(row.rejected) == [*shown, ("assistant", "bad", None)]


def test_conversations_without_a_prompt_share_what_they_begin_with(rows):
    row = rows({"chosen": [*ASKED, said("good")], "rejected": [*ASKED, said("bad")]})[0]
    assert talk(row) == [("user", "밤?", None), ("assistant", "good", None)]
    assert talk(row.rejected)[-1] == ("assistant", "bad", None)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([*ASKED, said("a")], [*ASKED, said("a")], "the same"),
        ([*ASKED, said("a")], [*ASKED, said("a"), *ASKED, said("b")], "beginning of the other"),
        ([*ASKED, said("a")], [said("b")], "same messages"),
    ],
)
def test_conversations_that_cannot_be_compared_are_refused(rows, chosen, rejected, reason):
    with pytest.raises(RowFault, match=reason) as caught:
        _ = rows({"chosen": chosen, "rejected": rejected})[0]
    assert caught.value.line == 1


def test_openais_pairs_keep_their_tools(rows):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    row = rows(
        {
            "input": {"messages": ASKED, "tools": [tool], "parallel_tool_calls": True},
            "preferred_output": [said("good")],
            "non_preferred_output": [said("bad")],
        }
    )[0]
    assert row.tools == row.rejected.tools == (tool,)
    assert talk(row.rejected)[-1] == ("assistant", "bad", None)


def test_of_scored_responses_the_best_is_held_against_the_worst(rows):
    told = [{"content": text, "score": score} for text, score in [("b", 2), ("a", 3), ("c", -1)]]
    row = rows({"prompt": "p", "responses": told, "metadata": {}})[0]
    assert (row.completion, row.rejected.completion, row.margin) == ("a", "c", None)
    row = rows({"prompt": ASKED, "responses": told})[0]
    assert talk(row)[-1] == ("assistant", "a", None)


def test_a_single_answer_is_wanted_or_not(rows):
    found = rows(*({"prompt": "a", "completion": "b", "label": label} for label in (True, False)))
    assert [row.label for row in found] == [True, False]
    assert found.format == "unpaired"


def test_a_label_that_is_no_truth_value_is_named_with_its_line(rows, tmp_path):
    good = {"prompt": "a", "completion": "b", "label": True}
    rows(good, {**good, "label": "yes"}, {"prompt": "a", "completion": "b"})
    report = check_file(tmp_path / "rows.jsonl")
    assert [(fault.line, fault.loc) for fault in report.faults] == [(2, "label"), (3, "")]
    assert "prompt_completion" in report.faults[1].msg


def test_a_label_column_of_another_kind_leaves_a_file_one_to_learn_from(rows):
    assert rows({"prompt": "a", "completion": "b", "label": "geography"}).format == (
        "prompt_completion"
    )


def test_a_pair_among_other_rows_is_refused_with_its_line(rows, tmp_path):
    rows({"prompt": "a", "completion": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"})
    fault = check_file(tmp_path / "rows.jsonl").faults[0]
    assert (fault.line, fault.unit) == (2, "line")
    assert "in the preference format, the first one was prompt_completion" in fault.msg


def test_a_file_of_another_kind_than_the_method_reads_is_refused_with_what_it_wants():
    with pytest.raises(ValidationError, match=r'prefs.jsonl holds rows like .*"chosen"') as caught:
        refuse_unsuited("sft", "preference", "prefs.jsonl", "dataset_path")
    assert '{"messages": […]}' in caught.value.message
    assert "train on it with dpo" in caught.value.message
    with pytest.raises(ValidationError, match=r'\{"prompt", "chosen", "rejected"\}'):
        refuse_unsuited("dpo", "openai", "chat.jsonl")
    for method, formats in READ.items():
        for format in formats:
            refuse_unsuited(method, format, "x")


def test_rows_are_left_out_with_their_lines_where_an_answer_is_cut_off_or_no_longer_differs(
    rows, chatml
):
    base = {"prompt": ASKED, "chosen": [said("좋은 밤")], "rejected": [said("나쁜 밤")]}
    long = "word " * 60
    found = rows(
        base,
        {**base, "rejected": [said(long)]},
        {**base, "chosen": [said(long + "a")], "rejected": [said(long + "b")]},
        {**base, "prompt": [{"role": "user", "content": long}]},
    )
    dropped = check_tokens(found, chatml, 48)
    assert dropped.overlong_lines == (2, 3, 4)
    assert dropped.failure is None
    cut = check_tokens(found, chatml, 48, "truncate")
    assert cut.masked_lines == (3, 4)
    refused = check_tokens(found, chatml, 48, "refuse")
    assert "3 of 4 rows are longer than 48 tokens (line 2, 3, 4)" in refused.failure


def test_answers_that_a_template_makes_equal_teach_nothing(rows, chatml):
    found = rows({"prompt": ASKED, "chosen": [said("밤")], "rejected": [said(" 밤 ")]})
    sizes = {tuple(chatml.encode(one).ids) for one in (found[0], found[0].rejected)}
    verdict = check_tokens(found, chatml, 20, "truncate")
    assert (verdict.failure is not None) == (len(sizes) == 1)


def test_a_file_in_which_nothing_can_be_learnt_is_refused(rows, tmp_path):
    plain = Renderer.load(PLAIN.write(tmp_path / "plain"))
    found = rows({"prompt": "word " * 90, "chosen": "a", "rejected": "b"})
    verdict = check_tokens(found, plain, 16, "truncate")
    assert "no row has anything to learn within 16 tokens (line 1)" in verdict.failure


def test_pairs_that_say_the_same_are_counted_and_a_mapping_by_hand_finds_their_columns(tmp_path):
    rows = [{"q": "가", "good": good, "bad": "나쁨"} for good in ("좋음", "더 좋음", "좋음")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    report = check_file(path, reading=Reading.by(columns))
    assert (report.format, report.num_samples, report.fault_count) == ("preference", 3, 0)
    assert [(twin.line, twin.first) for twin in report.duplicates.first] == [(3, 1)]

import hashlib
import json
import os
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunesmith.data import twins
from tunesmith.data.reading import Reading
from tunesmith.data.rows import Row, RowFault, RowIndex, check_file
from tunesmith.data.twins import Prints
from tunesmith.errors import BadRequestError, NotFoundError

CHAT = {
    "messages": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "😀 你好"}]
}
ROWS = {
    "openai": CHAT,
    "alpaca": {"instruction": "번역", "input": "hi", "output": "안녕"},
    "prompt_completion": {"prompt": "你", "completion": "好"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho 😀"}]
    },
    "text": {"text": "漢字 and more"},
    "unpaired": {"prompt": "你", "completion": "好", "label": True},
    "preference": {"prompt": "你", "chosen": "好", "rejected": "不", "margin": 2},
    "openai_preference": {
        "input": {"messages": [{"role": "user", "content": "안녕"}]},
        "preferred_output": [{"role": "assistant", "content": "😀"}],
        "non_preferred_output": [{"role": "assistant", "content": "!"}],
    },
    "scored": {
        "prompt": "你",
        "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 3.5}],
    },
    "prompts": {"prompt": "你", "reference": 7},
}


def write(folder, body, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def only_fault(folder, body, name="rows.jsonl"):
    report = check_file(write(folder, body, name))
    assert report.fault_count == 1, report.faults
    return report.faults[0]


@pytest.mark.parametrize("format", ROWS)
def test_each_format_is_found_and_read_as_lines_and_as_an_array(tmp_path, format):
    row = ROWS[format]
    for name, body in (("a.jsonl", lines(row, row, row)), ("a.json", json.dumps([row] * 3))):
        path = write(tmp_path, body, name)
        report = check_file(path)
        assert (report.format, report.num_samples, report.fault_count) == (format, 3, 0)
        assert report.size == path.stat().st_size
        assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        with RowIndex.open(path) as index:
            assert index.format == format
            assert [each.line for each in index] == [1, 2, 3]


def contents(row):
    return [(said.role, said.content) for said in row.messages]


def test_conversations_of_every_format_become_messages(tmp_path):
    def first(row):
        return RowIndex.open(write(tmp_path, lines(row)))[0]

    assert contents(first(CHAT)) == [("user", "안녕"), ("assistant", "😀 你好")]
    long = ROWS["alpaca"] | {"system": "kurz", "history": [["a", "b"]]}
    assert contents(first(long)) == [
        ("system", "kurz"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "번역\nhi"),
        ("assistant", "안녕"),
    ]
    assert contents(first(ROWS["sharegpt"])) == [("user", "Hi"), ("assistant", "Ho 😀")]
    assert first(ROWS["prompt_completion"]) == Row(1, prompt="你", completion="好")
    assert first(ROWS["text"]) == Row(1, text="漢字 and more")


def test_only_the_completion_of_a_pair_of_conversations_is_learnt(tmp_path):
    told = {"role": "assistant", "content": "b"}
    row = {"prompt": [{"role": "user", "content": "a"}, told], "completion": [told]}
    found = RowIndex.open(write(tmp_path, lines(row)))[0]
    assert [said.weight for said in found.messages] == [None, 0, None]


def test_parts_of_text_are_joined_and_weights_and_tools_kept(tmp_path):
    row = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "x", "weight": 0},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "weight": 1},
        ],
        "tools": [{"type": "function"}],
        "parallel_tool_calls": False,
    }
    found = RowIndex.open(write(tmp_path, lines(row)))[0]
    assert found.messages[0].content == "ab"
    assert [said.weight for said in found.messages] == [None, 0, 1]
    assert found.tools == ({"type": "function"},)


def test_blank_lines_byte_order_marks_and_carriage_returns_are_tolerated(tmp_path):
    body = b"\xef\xbb\xbf" + b'{"text":"a"}\r\n\r\n  \n{"text":"b"}'
    path = write(tmp_path, body)
    assert check_file(path).num_samples == 2
    assert [(row.line, row.text) for row in RowIndex.open(path)] == [(1, "a"), (4, "b")]
    path = write(tmp_path, b'\xef\xbb\xbf \r\n[ {"text":"a"} ,\r\n {"text":"b"} ]\r\n', "a.json")
    assert [row.text for row in RowIndex.open(path)] == ["a", "b"]


def test_plain_text_is_parted_at_blank_lines(tmp_path):
    path = write(tmp_path, "하나\nzwei\r\n\n\n\n三\n", "a.txt")
    assert [(row.line, row.text) for row in RowIndex.open(path)] == [(1, "하나\nzwei"), (6, "三")]
    assert check_file(path).format == "text"


def test_a_stored_file_without_a_suffix_is_read_by_its_content(tmp_path):
    body = lines(CHAT)
    assert check_file(write(tmp_path, body, "0f3a")).format == "openai"
    assert check_file(write(tmp_path, f"[{body}]", "0f3a")).format == "openai"
    assert check_file(write(tmp_path, "Once upon", "0f3a")).format == "text"
    assert check_file(write(tmp_path, "{ not json", "0f3a"), name="a.txt").format == "text"


BROKEN = {
    "nothing at all": ("", 0, "there is no row"),
    "only blanks": ("\n \n", 0, "there is no row"),
    "no JSON": ("hello", 1, "not JSON"),
    "cut off": ('{"text": "a"', 1, "not JSON"),
    "a list": ("[1]", 1, "must be an object"),
    "no known field": ('{"foo": 1}', 1, "expected messages"),
    "half a pair": ('{"prompt":"a","chosen":"b"}', 1, "`rejected` is missing"),
    "equal answers": ('{"prompt":"a","chosen":"b","rejected":"b"}', 1, "are the same: nothing"),
    "no rejected answer": ('{"prompt":"a","chosen":"b","rejected":""}', 1, "rejected is empty"),
    "text and messages": (
        '{"prompt":"a","chosen":"b","rejected":[{"role":"assistant","content":"c"}]}',
        1,
        "both be text",
    ),
    "text without a prompt": ('{"chosen":"b","rejected":"c"}', 1, "`prompt` is missing"),
    "one response": (
        '{"prompt":"a","responses":[{"content":"b","score":1}]}',
        1,
        "one response",
    ),
    "equal scores": (
        '{"prompt":"a","responses":[{"content":"b","score":1},{"content":"c","score":1}]}',
        1,
        "none is better",
    ),
    "no score": ('{"prompt":"a","responses":[{"content":"b"}]}', 1, "`score` is missing"),
    "a huge margin": (
        '{"prompt":"a","chosen":"b","rejected":"c","margin":1e12}',
        1,
        "expected `float`",
    ),
    "half of OpenAI's": (
        '{"input":{"messages":[{"role":"user","content":"a"}]},"preferred_output":[]}',
        1,
        "length >= 1",
    ),
    "a wrong type": ('{"text": 5}', 1, "expected `str`"),
    "no number": ('{"text": "a", "x": NaN}', 1, "not JSON"),
    "a name twice": ('{"text": "a", "text": "b"}', 1, "given twice"),
    "a name twice further in": ('{"text": "a", "x": {"y": 1, "y": 2}}', 1, "given twice"),
    "half a character": ('{"text": "\\ud83d"}', 1, "surrogate"),
    "broken UTF-8": (b'{"text": "\xff"}', 1, "not valid UTF-8 at byte 11"),
    "broken UTF-8 in a field of no meaning": (b'{"text": "a", "b": "\xe4"}', 1, "UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), 1, "UTF-16"),
    "a NUL": ('{"text": "a\\u0000b"}', 1, "NUL"),
    "deep brackets": ('{"text": "a", "x": ' + "[" * 99999 + "]" * 99999 + "}", 1, "deeply"),
    "deep braces": ('{"text": "a", "x": ' + '{"a":' * 9999 + "1" + "}" * 9999 + "}", 1, "deeply"),
    "an empty conversation": ('{"messages": []}', 1, "length >= 1"),
    "no answer": (lines(CHAT, {"messages": CHAT["messages"][:1]}), 2, "no assistant message"),
    "an unknown role": ('{"messages": [{"role": "bot", "content": "a"}]}', 1, "'bot'"),
    "no role": ('{"messages": [{"content": "a"}]}', 1, "`role` is missing"),
    "an empty answer": ('{"messages": [{"role": "assistant", "content": ""}]}', 1, "empty"),
    "no content": ('{"messages": [{"role": "assistant"}]}', 1, "content is missing"),
    "a strange weight": (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}',
        1,
        "enum value 2",
    ),
    "only context": (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
        1,
        "weight 0",
    ),
    "a weight of a question": (
        '{"messages": [{"role": "user", "content": "a", "weight": 1}]}',
        1,
        "only assistant messages",
    ),
    "a picture": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        1,
        "only text",
    ),
    "an empty output": ('{"instruction": "a", "output": ""}', 1, "output is empty"),
    "no output": ('{"instruction": "a"}', 1, "`output` is missing"),
    "an empty instruction": ('{"instruction": " ", "output": "b"}', 1, "instruction is empty"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', 1, "completion is empty"),
    "half a conversation": ('{"prompt": "a", "completion": [{"role": "assistant"}]}', 1, "both"),
    "an unknown speaker": ('{"conversations": [{"from": "x", "value": "a"}]}', 1, "'x'"),
    "an empty text": ('{"text": " "}', 1, "text is empty"),
    "another format": (lines(CHAT, {"text": "a"}), 2, "text format, the first one was openai"),
    "a later line": ('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}', 3, "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name):
    body, line, reason = BROKEN[name]
    fault = only_fault(tmp_path, body)
    assert fault.line == line
    assert reason in fault.msg


@pytest.mark.parametrize(
    ("body", "row", "reason"),
    [
        ("[]", 0, "no row"),
        ('[{"text":"a"},]', 2, "a row is missing"),
        ('[{"text":"a"}', 1, "comma or the end"),
        ('[{"text":"a"} {"text":"b"}]', 1, "comma"),
        ('[{"text":"a"}] x', 1, "after the end"),
        ('[{"text":"a"},{"text":"b]', 2, "ends inside"),
        ('[{"text":"a"}, 7]', 2, "object in braces"),
        ('[{"text":"a"}, "b"]', 2, "object in braces"),
        ('[{"text":"a"}, {"text":1}]', 2, "expected `str`"),
        ("[", 1, "ends inside"),
    ],
)
def test_rows_of_an_array_are_counted_from_one(tmp_path, body, row, reason):
    fault = only_fault(tmp_path, body, "a.json")
    assert (fault.line, fault.unit if row else "row") == (row, "row")
    assert reason in fault.msg


def test_the_first_faults_are_kept_and_all_are_counted(tmp_path):
    report = check_file(write(tmp_path, "no\n" * 500))
    assert report.fault_count == 500
    assert [fault.line for fault in report.faults] == list(range(1, 21))
    assert not report.is_usable
    assert len(check_file(write(tmp_path, "no\n" * 500), max_faults=3).faults) == 3


def test_the_place_inside_a_row_is_named(tmp_path):
    body = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 5}]}'
    fault = only_fault(tmp_path, body)
    assert fault.loc == "messages[1].content"


def test_a_row_may_have_a_system_prompt_and_a_template_for_what_users_say(tmp_path):
    row = CHAT | {"system_prompt": "친절히", "input_template": "问: {input}\n{input}!"}
    [found] = RowIndex.open(write(tmp_path, lines(row)))
    assert [(said.role, said.content) for said in found.messages] == [
        ("system", "친절히"),
        ("user", "问: 안녕\n안녕!"),
        ("assistant", "😀 你好"),
    ]


@pytest.mark.parametrize(
    ("more", "loc", "reason"),
    [
        ({"input_template": "问: "}, "input_template", "no {input}"),
        ({"input_template": "{input}" * 500_000}, "input_template", "longer than"),
        ({"input_template": "\0{input}"}, "input_template", "NUL"),
        ({"system_prompt": 5}, "system_prompt", "expected `str"),
        (
            {"system_prompt": "b", "messages": [{"role": "system", "content": "a"}]},
            "system_prompt",
            "keep one",
        ),
    ],
)
def test_a_frame_that_does_not_fit_is_a_fault(tmp_path, more, loc, reason):
    messages = [*more.pop("messages", ()), *CHAT["messages"]]
    fault = only_fault(tmp_path, lines({**more, "messages": messages}))
    assert (fault.line, fault.loc) == (1, loc)
    assert reason in fault.msg


def test_columns_of_no_meaning_are_ignored_and_named_once(tmp_path):
    row = CHAT | {"id": 7, "메모": {"a": [1]}}
    report = check_file(write(tmp_path, lines(row, row)))
    assert report.fault_count == 0
    assert report.ignored_fields == ("id", "메모")


def test_a_row_is_read_alone_and_raises_its_own_fault(tmp_path):
    index = RowIndex.open(write(tmp_path, '{"text":"a"}\nbroken\n{"text":"😀"}\n'))
    assert len(index) == 3
    assert index[2].text == "😀"
    assert index[-1].text == "😀"
    with pytest.raises(RowFault, match="line 2: not JSON") as caught:
        index[1]
    assert (caught.value.line, caught.value.status_code) == (2, 422)
    assert caught.value.validation_errors[0]["loc"] == ["line", 2]
    with pytest.raises(IndexError):
        index[3]


def test_a_file_with_no_row_cannot_be_opened(tmp_path):
    for body in ("", "[]", "\n"):
        with pytest.raises(RowFault, match="no row"):
            RowIndex.open(write(tmp_path, body))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path, lines(CHAT)))
    for name in ("pipe.jsonl", "link.jsonl", "."):
        with pytest.raises(BadRequestError):
            check_file(tmp_path / name)
        with pytest.raises(BadRequestError):
            RowIndex.open(tmp_path / name)
    with pytest.raises(BadRequestError):
        check_file("/dev/zero")
    with pytest.raises(NotFoundError, match="no such data set"):
        check_file(tmp_path / "none.jsonl")


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "sparse.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(200 << 20)
    assert "longer than 64 MB" in check_file(path).faults[0].msg


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_large_file_is_checked_in_little_memory(tmp_path, suffix):
    row = json.dumps({"text": "긴 글 " * 1000}, ensure_ascii=False)
    array = suffix == ".json"
    body = ",\n".join([row] * 2000) if array else "\n".join([row] * 2000)
    path = write(tmp_path, f"[{body}]" if array else body, f"a{suffix}")
    assert path.stat().st_size > 15 << 20
    seen = []
    tracemalloc.start()
    report = check_file(path, on_progress=lambda done, size: seen.append((done, size)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.num_samples == 2000
    assert report.fault_count == 0
    assert peak < 8 << 20
    assert seen[-1] == (report.size, report.size)
    assert seen == sorted(seen)
    assert len(RowIndex.open(path)) == 2000


def test_a_row_larger_than_what_is_read_at_once_is_whole(tmp_path):
    row = {"text": '"]}, \\ 漢 ' * 400_000}
    path = write(tmp_path, json.dumps([row, row, {"text": "a"}]), "a.json")
    with RowIndex.open(path) as index:
        assert [row.line for row in index] == [1, 2, 3]
        assert index[1].text == row["text"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "from", "value", "prompt", "completion", "text"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
bodies = (
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
    | st.lists(json_values, max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode("utf-8", "replace")
    )
    | json_values.map(lambda value: json.dumps([value]).encode())
)


@given(body=bodies, suffix=st.sampled_from([".jsonl", ".json", ".txt", ""]))
@example(body=b'{"text": "a"}\n', suffix=".jsonl")
@example(body=b"\xef\xbb\xbf", suffix=".json")
@example(body=b"\xef\xbb\xbf[", suffix=".json")
@example(body=b'[{"a":"\\', suffix=".json")
@settings(max_examples=400, deadline=None)
def test_whatever_stands_in_a_file_is_a_row_or_a_fault(tmp_path_factory, body, suffix):
    path = write(tmp_path_factory.getbasetemp(), body, f"fuzz{suffix}")
    report = check_file(path)
    assert report.fault_count or report.num_samples
    try:
        index = RowIndex.open(path)
    except RowFault:
        assert report.fault_count
        return
    read = [taken(index, at) for at in range(len(index))]
    assert all(isinstance(each, Row) or each.line for each in read)
    if not report.fault_count:
        assert [each.line for each in read if isinstance(each, Row)] == sorted(
            set(index_lines(index))
        )
    index.close()


def taken(index, at):
    try:
        return index[at]
    except RowFault as fault:
        return fault


def index_lines(index):
    return [index.line(at) for at in range(len(index))]


def plain(folder, *texts, controls="refused", name="a.jsonl"):
    body = lines(*({"text": text} for text in texts)) if name == "a.jsonl" else "\n\n".join(texts)
    return check_file(write(folder, body, name), reading=Reading(controls=controls))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("sign", ["\x07", "\x1b", "\x7f", "\x85", "\x00", "\x0b"])
def test_a_control_character_in_a_corpus_is_refused_and_can_be_removed(tmp_path, name, sign):
    texts = ("a", f"글{sign}文", "c")
    report = plain(tmp_path, *texts, name=name)
    assert report.fault_count == 1
    assert report.faults[0].line == (2 if name == "a.jsonl" else 3)
    assert ("NUL" if sign == "\0" else f"U+{ord(sign):04X}") in report.faults[0].msg
    reading = Reading(controls="removed")
    assert plain(tmp_path, *texts, controls="removed", name=name).fault_count == 0
    assert RowIndex.open(tmp_path / name, reading)[1].text == "글文"


def test_tabs_and_newlines_are_no_control_characters(tmp_path):
    assert plain(tmp_path, "a\tb\nc\r\nd").fault_count == 0
    assert plain(tmp_path, "a\rb").fault_count == 1


def test_raw_control_bytes_are_removed_before_a_line_is_read(tmp_path):
    path = write(tmp_path, b'{"text": "a\x00\x07b"}\n')
    assert check_file(path).fault_count == 1
    reading = Reading(controls="removed")
    assert RowIndex.open(path, reading)[0].text == "ab"
    report = check_file(path, reading=reading)
    assert (report.num_samples, report.fault_count) == (1, 0)


def test_control_characters_in_conversations_are_kept(tmp_path):
    row = {"prompt": "a\x07", "completion": "b\x1b"}
    assert check_file(write(tmp_path, lines(row)), reading=Reading()).fault_count == 0


def twin_lines(report):
    return [(twin.line, twin.first) for twin in report.duplicates.first]


def test_rows_that_say_the_same_are_counted_and_named_whatever_their_spelling(tmp_path):
    body = (
        '{"prompt": "a", "completion": "b"}\n'
        '{"prompt": "a", "completion": "c"}\n'
        '{"id": 3, "completion": "b",   "prompt": "a"}\n'
        '{"prompt": "\\u0061", "completion": "b"}\n'
    )
    report = check_file(write(tmp_path, body))
    assert (report.fault_count, report.duplicates.count) == (0, 2)
    assert twin_lines(report) == [(3, 1), (4, 1)]


def test_only_the_first_twins_are_named_and_all_are_counted(tmp_path):
    report = check_file(write(tmp_path, lines(*[{"text": str(at % 100)} for at in range(5000)])))
    assert report.duplicates.count == 4900
    assert twin_lines(report) == [(line, line - 100) for line in range(101, 121)]


def test_twins_are_found_where_they_overflow_to_a_file(tmp_path):
    count = 300_000
    with Prints(tmp_path) as prints:
        for at in range(count):
            prints.add(Row(at + 1, text=str(at % (count - 3))))
        assert prints._file is not None
        found = twins.repeats(prints)
    assert found.count == 3
    assert [(twin.line, twin.first) for twin in found.first] == [
        (count - 2 + at, 1 + at) for at in range(3)
    ]
    assert list(tmp_path.iterdir()) == []

"""CSV and Parquet: read as they are written, named by line and row, bounded against bad intent."""

import csv
import io
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import parquet_child
from tunesmith.data.reader import find_row
from tunesmith.data.reading import Reading
from tunesmith.data.rows import RowFault, RowIndex, check_file

ALPACA = [
    {"instruction": 'Say "안녕", twice', "input": "", "output": "안녕\n안녕 😀"},
    {"instruction": "번역, 请", "input": "a;b", "output": "你\r\n好"},
    {"instruction": "plain", "input": "tab\there", "output": "'single'"},
]
BY_HAND = Reading.by({"instruction": "question", "output": "answer"})


def write(folder, body, name="rows.csv"):
    path = folder / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


def table(rows, **dialect):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet(folder, columns, name="rows.parquet", **options):
    path = folder / name
    pq.write_table(pa.table(columns), path, **options)
    return path


def only_fault(path, **more):
    report = check_file(path, **more)
    assert report.fault_count == 1, report.faults
    return report.faults[0]


def said(row):
    return [message.content for message in row.messages]


@pytest.mark.parametrize(
    ("name", "dialect"),
    [("a.csv", {}), ("a.csv", {"delimiter": ";"}), ("a.tsv", {"delimiter": "\t"})],
)
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_a_table_says_what_the_same_rows_in_json_say(tmp_path, name, dialect, end):
    path = write(tmp_path, table(ALPACA, lineterminator=end, **dialect), name)
    plain = write(tmp_path, "\n".join(map(json.dumps, ALPACA)), "a.jsonl")
    report = check_file(path)
    assert (report.format, report.num_samples, report.fault_count) == ("alpaca", 3, 0)
    with RowIndex.open(path) as rows, RowIndex.open(plain) as same:
        assert [each.messages for each in rows] == [each.messages for each in same]


def test_lines_are_counted_through_newlines_in_quotes(tmp_path):
    body = '\ufeffinstruction,output\r\n"a\nb\nc",x\r\n\r\n"d",\r\n"e","f\n"\n'
    path = write(tmp_path, body)
    report = check_file(path)
    assert [(fault.line, fault.loc) for fault in report.faults] == [(6, "output")]
    with RowIndex.open(path) as rows:
        assert [rows.line(at) for at in range(3)] == [2, 6, 7]
        assert said(rows[2]) == ["e", "f\n"]
        with pytest.raises(RowFault, match="line 6, output: the output is empty"):
            rows[1]


def test_a_column_without_a_name_is_an_index_and_ignored(tmp_path):
    path = write(tmp_path, ",instruction,output,메모\n0,a,b,c\n1,d,e,f\n")
    report = check_file(path)
    assert (report.fault_count, report.ignored_fields) == (0, ("메모",))


def test_a_cell_may_hold_a_conversation_as_json(tmp_path):
    messages = [{"role": "user", "content": "한"}, {"role": "assistant", "content": "국"}]
    path = write(tmp_path, table([{"messages": json.dumps(messages), "tools": ""}]))
    assert check_file(path).format == "openai"
    assert said(RowIndex.open(path)[0]) == ["한", "국"]
    broken = write(tmp_path, table([{"messages": "[{"}]))
    assert "a list that is not JSON" in only_fault(broken).msg


BROKEN = {
    "too few cells": ("instruction,output\na\n", 2, "1 cells, where the first line names 2"),
    "too many": ("instruction,output\na,b,c\n", 2, "3 cells"),
    "a stray quote": ('instruction,output\n"a"b,c\n', 2, "not CSV"),
    "a quote that is never closed": ('instruction,output\n"a,b\nc,d\n', 2, "not CSV"),
    "broken UTF-8": (b"instruction,output\na,\xff\n", 2, "not valid UTF-8 at byte 3"),
    "a NUL": (b"instruction,output\na,b\0\n", 2, "NUL"),
    "UTF-16": ("instruction,output\na,b\n".encode("utf-16"), 1, "UTF-16"),
    "a name twice": ("a,b,a\n1,2,3\n", 1, "'a' is there twice"),
    "broken UTF-8 in the names": (b"a,\xff\n1,2\n", 1, "not valid UTF-8"),
    "no row": ("instruction,output\n", 0, "no row in it under the names"),
    "nothing": ("", 0, "no row in it under the names"),
    "only blanks": ("\n \n", 0, "no row in it under the names"),
    "no known column": ("foo,bar\n1,2\n", 2, "no known format has the fields 'bar', 'foo'"),
    "old line ends": (b"instruction,output\ra,b\r", 1, "not CSV"),
    "100,000 columns": (
        ",".join(f"c{at}" for at in range(100_000)) + "\nx\n",
        1,
        "100,000 columns",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_in_a_table_is_named_with_its_line(tmp_path, name):
    body, line, reason = BROKEN[name]
    fault = only_fault(write(tmp_path, body))
    assert fault.line == line
    assert reason in fault.msg


def test_one_bad_line_hides_no_other(tmp_path):
    body = b"instruction,output\n" + b"a\n" * 30 + b"\xff,b\n" + b"c,d\n"
    report = check_file(write(tmp_path, body))
    assert (report.num_samples, report.fault_count) == (32, 31)
    assert [fault.line for fault in report.faults] == list(range(2, 22))


def test_a_line_of_ten_megabytes_is_a_fault_and_not_a_failure(tmp_path):
    long = b"x" * (10 << 20)
    body = b"instruction,output\n" + long + b",b\nc,d\n"
    report = check_file(write(tmp_path, body))
    assert [fault.line for fault in report.faults] == [2]
    assert report.num_samples == 2


def test_an_endless_quote_is_given_up_at_the_limit(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.write(b'instruction,output\na,b\n"')
        file.truncate(200 << 20)
    fault = check_file(path).faults[0]
    assert (fault.line, "longer than 64 MB" in fault.msg) == (3, True)


def test_a_large_table_is_checked_in_little_memory(tmp_path):
    rows = [{"instruction": f"긴 질문 {at} " * 40, "output": "답\n" * 20} for at in range(10_000)]
    path = write(tmp_path, table(rows))
    assert path.stat().st_size > 4 << 20
    seen = []
    tracemalloc.start()
    report = check_file(path, on_progress=lambda done, size: seen.append((done, size)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.num_samples, report.fault_count) == (10_000, 0)
    assert peak < 4 << 20
    assert seen == sorted(seen)
    assert seen[-1] == (report.size, report.size)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)


@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_whatever_python_writes_as_csv_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "back.csv"
    path.write_text(
        table([{"prompt": asked, "completion": told} for asked, told in rows]), newline=""
    )
    with RowIndex.open(path) as index:
        assert [(row.prompt, row.completion) for row in index] == rows


@given(body=st.binary(max_size=200) | st.text('ab,"\n\r;\t', max_size=60).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_a_table_is_a_row_or_a_fault(tmp_path_factory, body):
    path = write(tmp_path_factory.getbasetemp(), b"text,x\n" + body, "fuzz.csv")
    report = check_file(path)
    assert report.fault_count or report.num_samples
    try:
        rows = RowIndex.open(path)
    except RowFault:
        assert report.fault_count
        return
    assert len(rows) == report.num_samples or report.fault_count
    rows.close()


# columns mapped by hand


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_columns_are_mapped_by_hand_whatever_the_file(tmp_path, name):
    rows = [{"question": "문", "answer": "답", "instruction": "no"}] * 2
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        bodies = {
            "a.csv": table(rows),
            "a.jsonl": "\n".join(map(json.dumps, rows)),
            "a.json": json.dumps(rows),
        }
        path.write_text(bodies[name])
    report = check_file(path, reading=BY_HAND)
    assert (report.format, report.num_samples, report.fault_count) == ("alpaca", 2, 0)
    assert report.ignored_fields == ("instruction",)
    with RowIndex.open(path, BY_HAND) as index:
        assert said(index[1]) == ["문", "답"]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = write(tmp_path, "frage,answer\na,b\n")
    fault = only_fault(path, reading=BY_HAND)
    assert (fault.line, fault.loc) == (2, "instruction")
    assert "no column 'question'" in fault.msg
    assert "'frage', 'answer'" in fault.msg


def test_a_column_that_a_row_may_lack_is_left_out(tmp_path):
    rows = [{"q": "a", "a": "b", "more": "c"}, {"q": "a", "a": "b"}]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")
    reading = Reading.by({"instruction": "q", "output": "a", "input": "more"})
    with RowIndex.open(path, reading) as index:
        assert [said(row)[0] for row in index] == ["a\nc", "a"]


def test_plain_text_has_no_columns_to_map(tmp_path):
    path = write(tmp_path, "hello", "a.txt")
    assert "plain text has no columns" in only_fault(path, reading=BY_HAND).msg


def test_readings_are_kept_apart_by_their_keys():
    keys = {
        Reading().key,
        BY_HAND.key,
        Reading.by({"instruction": "answer", "output": "question"}).key,
        Reading(controls="refused").key,
        Reading(controls="removed").key,
    }
    assert len(keys) == 5
    assert Reading.by({"b": "1", "a": "2"}).key == Reading.by({"a": "2", "b": "1"}).key


# Parquet


def test_parquet_says_what_the_same_rows_in_json_say(tmp_path):
    path = parquet(tmp_path, pa.Table.from_pylist(ALPACA), row_group_size=2)
    report = check_file(path)
    assert (report.format, report.num_samples, report.fault_count) == ("alpaca", 3, 0)
    plain = write(tmp_path, "\n".join(map(json.dumps, ALPACA)), "a.jsonl")
    with RowIndex.open(path) as rows, RowIndex.open(plain) as same:
        assert [each.messages for each in rows] == [each.messages for each in same]
        assert [rows.line(at) for at in range(3)] == [1, 2, 3]


def test_conversations_in_parquet_are_lists_of_structures(tmp_path):
    messages = [{"role": "user", "content": "한"}, {"role": "assistant", "content": "국 😀"}]
    path = parquet(tmp_path, {"messages": [messages, messages], "id": [1, 2]})
    assert check_file(path).ignored_fields == ("id",)
    assert said(RowIndex.open(path)[1]) == ["한", "국 😀"]


def test_a_fault_in_parquet_names_its_row(tmp_path):
    path = parquet(tmp_path, {"instruction": ["a", "b", None], "output": ["x", "", "z"]})
    report = check_file(path)
    assert [(fault.unit, fault.line, fault.loc) for fault in report.faults] == [
        ("row", 2, "output"),
        ("row", 3, "instruction"),
    ]


def test_bytes_in_parquet_are_text_where_they_are_utf_8(tmp_path):
    path = parquet(tmp_path, {"text": pa.array(["한".encode(), b"\xff"], pa.binary())})
    report = check_file(path)
    assert [(fault.line, "not valid UTF-8" in fault.msg) for fault in report.faults] == [(2, True)]
    assert RowIndex.open(path)[0].text == "한"


def test_unknown_columns_of_parquet_are_named(tmp_path):
    path = parquet(tmp_path, {"foo": range(1000), "bar": range(1000)})
    assert "'bar', 'foo'" in only_fault(path).msg


def test_rows_of_parquet_are_read_at_random_and_survive_their_file(tmp_path):
    path = parquet(tmp_path, {"text": [f"줄 {at}" for at in range(3000)]}, row_group_size=100)
    rows = RowIndex.open(path)
    path.unlink()
    assert [rows[at].text for at in (2999, 0, 1500)] == ["줄 2999", "줄 0", "줄 1500"]


@pytest.mark.parametrize("body", [b"", b"PAR1", b"PAR1" * 100, b"{}\n", os.urandom(4000)])
def test_what_is_no_parquet_is_told_so(tmp_path, body):
    fault = only_fault(write(tmp_path, body, "a.parquet"))
    assert fault.line == 0
    assert "Parquet" in fault.msg


@pytest.mark.parametrize("at", range(0, 700, 37))
def test_a_damaged_parquet_file_is_a_fault_or_rows(tmp_path, at):
    path = parquet(tmp_path, {"text": [f"row {n}" for n in range(20)]}, compression="none")
    body = bytearray(path.read_bytes())
    body[at % len(body)] ^= 0xFF
    path.write_bytes(body)
    report = check_file(path)
    assert report.fault_count or report.num_samples


def test_a_cell_that_unfolds_to_gigabytes_ends_its_reader_and_nothing_else(tmp_path):
    """A dictionary of one long text, named a hundred thousand times: 900 bytes on the disk."""
    long = pa.array(["x" * (8 << 20)])
    names = pa.array([0] * 100_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(names, long)
    path = parquet(tmp_path, {"text": column}, compression="zstd", write_statistics=False)
    assert path.stat().st_size < 10_000
    fault = only_fault(path)
    assert "GB of memory" in fault.msg


def test_a_file_that_says_it_has_too_many_rows_is_refused(tmp_path, monkeypatch):
    path = parquet(tmp_path, {"text": ["a"] * 30})
    monkeypatch.setattr(parquet_child, "MAX_ROWS", 20)
    with path.open("rb") as file, pytest.raises(parquet_child.Refused, match="30 rows; 20 is"):
        list(parquet_child.lines(file, ["text"]))


def test_a_hundred_thousand_columns_are_refused(tmp_path):
    path = parquet(tmp_path, {f"c{at}": [at] for at in range(10_000)})
    assert "10,000 columns; 4,096 is the limit" in only_fault(path).msg


def test_without_its_library_parquet_names_what_to_install(tmp_path, monkeypatch):
    path = parquet(tmp_path, {"text": ["a"]})
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pyarrow.py").write_text("raise ModuleNotFoundError('No module named pyarrow')")
    monkeypatch.setenv("PYTHONPATH", str(bare))
    assert "pip install 'tunesmith[data]'" in only_fault(path).msg


# one row


@pytest.mark.parametrize(
    ("asked", "number", "text"),
    [
        ({"row": 1}, 1, "a\nb"),
        ({"row": 2}, 2, "c"),
        ({"line": 2}, 1, "a\nb"),
        ({"line": 3}, 1, "a\nb"),
        ({"line": 5}, 2, "c"),
    ],
)
def test_a_row_is_found_by_its_number_or_a_line_of_it(tmp_path, asked, number, text):
    path = write(tmp_path, 'text\n"a\nb"\n\nc\n')
    with path.open("rb") as file:
        row, format, at = find_row(file, ".csv", Reading(), **asked)
    assert (row.text, format, at) == (text, "text", number)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"row": 3}, "row 3: the file ends before it, after 2 rows"),
        ({"line": 4}, "line 4: no row stands there; the next one begins in line 5"),
        ({"line": 6}, "line 6: the file ends before it"),
    ],
)
def test_a_row_that_is_not_there_is_told_so(tmp_path, asked, told):
    path = write(tmp_path, 'text\n"a\nb"\n\nc\n')
    with path.open("rb") as file, pytest.raises(RowFault, match=told):
        find_row(file, ".csv", Reading(), **asked)

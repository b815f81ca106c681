"""`data check` and `data preview` as a user types them, without a server."""

import json
import os
from pathlib import Path

import pytest

from train_fixtures import make_model, write_rows
from tunesmith.cli import main
from tunesmith.cli.painted import painted
from tuning_sdk import Token

Output = pytest.CaptureFixture[str]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": "강물?"},
            {"role": "assistant", "content": "힣 水 🌊"},
        ]
    }
] * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("TUNESMITH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "chat.jsonl", CHAT)
    (tmp_path / "table.csv").write_text("question,answer\n가,나\nb,\n")
    return tmp_path


def run(line: str, capsys: Output) -> tuple[int, str, str]:
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


def test_rows_that_stand_in_both_files_are_told(here: Path, capsys: Output) -> None:
    write_rows(here / "eval.jsonl", [{"messages": CHAT[0]["messages"] * 2}, CHAT[0]])
    code, _, err = run("data check chat.jsonl --eval eval.jsonl", capsys)
    assert code == 0
    assert "1 row of the validation set in the training set" in err
    assert "(line 2 as line 1)" in err
    _, out, _ = run("data check chat.jsonl --eval eval.jsonl --json", capsys)
    assert json.loads(out)["overlap"]["first"] == [{"line": 2, "first": 1}]
    assert run("data check chat.jsonl --eval none.jsonl", capsys)[0] == 3


def test_a_sound_file_is_told_with_what_is_twice_in_it(capsys: Output) -> None:
    code, _, err = run("data check chat.jsonl", capsys)
    assert code == 0
    assert "3 rows, openai" in err
    assert "2 rows with the words of an earlier row (line 2 as line 1, line 3 as line 1)" in err


def test_faults_are_listed_by_line_and_end_with_1(capsys: Output) -> None:
    mapped = "--columns instruction=question --columns output=answer"
    code, _, err = run(f"data check table.csv {mapped}", capsys)
    assert code == 1
    assert "line 3, output: the output is empty: nothing to learn" in err
    code, out, _ = run(f"data check table.csv {mapped} --json", capsys)
    assert (code, json.loads(out)["fault_count"]) == (1, 1)


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("data check none.jsonl", 3, "nothing lies at 'none.jsonl'"),
        ("data check chat.jsonl --columns x", 2, "has to be FIELD=COLUMN"),
        ("data check chat.jsonl --columns a=b --columns a=c", 2, "maps a twice"),
        ("data check chat.jsonl --pretrain", 1, "pretraining reads plain text"),
        ("data preview chat.jsonl", 2, "--model"),
        ("data preview chat.jsonl -m nowhere", 3, "nothing lies at 'nowhere'"),
        ("data preview chat.jsonl -m . --row 0", 2, "greater than or equal to 1"),
    ],
)
def test_bad_input_is_told_with_its_code(line: str, code: int, told: str, capsys: Output) -> None:
    found, _, err = run(line, capsys)
    assert (found, told.lower() in err.lower()) == (code, True), err


def test_control_characters_are_faults_of_a_corpus_only(here: Path, capsys: Output) -> None:
    write_rows(here / "corpus.jsonl", [{"text": "a\x07b"}, {"text": "c\td\r\ne"}])
    assert run("data check corpus.jsonl", capsys)[0] == 0
    code, _, err = run("data check corpus.jsonl --pretrain", capsys)
    assert code == 1
    assert "line 1, text: the control character U+0007 at character 2" in err
    assert run("data check corpus.jsonl --pretrain --clean", capsys)[0] == 0


def test_what_is_learnt_is_marked_where_there_are_no_colours(model: Path, capsys: Output) -> None:
    code, out, err = run(f"data preview chat.jsonl -m {model} --row 2", capsys)
    assert code == 0, err
    assert "row 2, line 2, openai, template: model" in err
    shown = out.partition("trained:")[0]
    assert shown.startswith("<|im_start|>user⏎")
    assert shown.index("⟦") > shown.index("assistant")
    assert "\\xed" in shown
    assert "\x1b" not in out


def test_a_preview_in_json_holds_ids_and_weights(model: Path, capsys: Output) -> None:
    code, out, _ = run(f"data preview chat.jsonl -m {model} --line 3 --json", capsys)
    found = json.loads(out)
    assert (code, found["row"], found["fate"]) == (0, 3, "trained")
    assert len(found["ids"]) == len(found["weights"]) == len(found["tokens"])


def test_a_row_that_is_not_there_and_a_clash_are_told(model: Path, capsys: Output) -> None:
    code, _, err = run(f"data preview chat.jsonl -m {model} --row 9", capsys)
    assert (code, "after 3 rows" in err) == (1, True)
    code, _, err = run(f"data preview chat.jsonl -m {model} --row 1 --line 1", capsys)
    assert (code, "exclude each other" in err) == (1, True)


def test_tokens_cannot_steer_the_terminal() -> None:
    tokens = [Token(id=1, text="\x1b[2Ja\n", weight=1), Token(id=2, text="b\x07", weight=0)]
    assert "".join(painted(tokens, False)) == "⟦[2Ja⏎\n⟧b"
    coloured = "".join(painted(tokens, True))
    assert coloured == "\x1b[1m[2Ja⏎\x1b[0m\n\x1b[2m\x1b[4mb\x1b[0m"

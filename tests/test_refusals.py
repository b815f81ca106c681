"""What a data set is refused or warned for, over the real door, in every kind of file."""

import csv
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer, normalizers

from api_fixtures import hub_of, make_workspace, open_door
from data_fixtures import FAMILIES, Family, conversations
from task_files import PLAIN_PIECES, sentencepiece_model
from train_fixtures import write_rows
from tunesmith.data import sentencepiece
from tunesmith.data.render import Renderer
from tunesmith.hub.principal import Principal
from tunesmith.spec.chat import Message

SECOND = {"jsonl": ("line", 2), "json": ("row", 2), "csv": ("line", 3), "parquet": ("row", 2)}
"""Where the second row stands."""
SILENT = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


def chat(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


FINE = chat(("user", "안녕 🌊"), ("assistant", "你好"))
PAIR = {"prompt": "강물", "chosen": "좋다", "rejected": "나쁘다"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "unknown role": (
        "sft",
        FINE,
        chat(("사용자", "물"), ("assistant", "b")),
        "unknown role '사용자'; a message is by system, developer, user, assistant or tool",
    ),
    "no answer": ("sft", FINE, chat(("user", "물")), "there is no assistant message"),
    "empty answer": ("sft", FINE, chat(("user", "물"), ("assistant", "")), "nothing to learn"),
    "equal": (
        "dpo",
        PAIR,
        PAIR | {"rejected": "좋다"},
        "chosen and rejected are the same: nothing to learn",
    ),
    "control": ("pretrain", {"text": "한"}, {"text": "a\tb\u0085"}, "U+0085 at character 4"),
    "nul": ("pretrain", {"text": "한"}, {"text": "a\0"}, "NUL character"),
}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path_factory.mktemp("refused"))) as door:
        yield door


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(cells)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return f"data/{path.name}"


def submit(door: TestClient, method: str, dataset: str, more: str = "") -> Any:
    text = f"method: {method}\nmodel: models/tiny\ndataset: {dataset}\n{more}"
    headers = {"Content-Type": "application/yaml"}
    return door.post("/train/config", content=text.encode(), headers=headers)


@pytest.mark.parametrize("kind", SECOND)
@pytest.mark.parametrize("name", CASES)
def test_a_row_is_refused_with_its_number(door: TestClient, name: str, kind: str) -> None:
    method, good, bad, told = CASES[name]
    dataset = write(hub_of(door).workspace / "data", [good, bad], kind)
    answer = submit(door, method, dataset)
    assert answer.status_code == 422, answer.text
    [fault] = answer.json()["detail"]
    assert tuple(fault["loc"][1:3]) == SECOND[kind]
    assert told in fault["msg"]


@pytest.mark.parametrize(
    ("name", "body", "where", "told"),
    [
        ("a.jsonl", json.dumps(FINE).encode("utf-16"), ("line", 1), "UTF-16"),
        ("b.jsonl", b'{"prompt": "\xbe\xc8", "completion": "b"}', ("line", 1), "UTF-8 at byte 13"),
        ("c.json", b'[{"prompt": "\xbe", "completion": "b"}]', ("row", 1), "not valid UTF-8"),
        ("d.csv", b"prompt,completion\na,b\n\xbe\xc8,x\n", ("line", 3), "UTF-8 at byte 1"),
        ("e.txt", b"ok\n\ncaf\xe9", ("line", 3), "not valid UTF-8"),
        (
            "f.jsonl",
            b'{"prompt": "\\ud83d", "completion": "b"}',
            ("line", 1),
            "half of a surrogate",
        ),
        ("g.parquet", None, ("row", 2), "UTF-8 at byte 1 of a cell"),
    ],
)
def test_a_wrong_encoding_is_refused_with_its_place(
    door: TestClient, name: str, body: bytes | None, where: tuple[str, int], told: str
) -> None:
    path = hub_of(door).workspace / "data" / name
    if body is None:  # a column that says it is text, and is not
        prompts = pa.array([b"a", b"\xb0\xa1"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"prompt": prompts, "completion": ["x", "y"]}), path)
    else:
        path.write_bytes(body)
    answer = submit(door, "pretrain" if name.endswith(".txt") else "sft", f"data/{name}")
    assert answer.status_code == 422, answer.text
    fault = answer.json()["detail"][0]
    assert tuple(fault["loc"][1:3]) == where
    assert told in fault["msg"]


def looked_at(door: TestClient, answer: Any) -> dict[str, Any]:
    """The event that ends a job's check, where it was not looked at before."""
    assert answer.status_code == 200, answer.text
    hub, job_id = hub_of(door), answer.json()["job_id"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        is_known = hub.job(job_id, Principal.local()).is_validated
        for event in hub.events_after(job_id, 1):
            if event.type in ("validated", "failed"):
                return {"type": event.type, **event.data}
        if is_known:
            return {"type": "validated"}
        time.sleep(0.02)
    raise AssertionError("the check did not end")


def test_rows_that_lose_their_answer_are_told_by_number(door: TestClient) -> None:
    rows = [
        FINE,
        chat(("user", "a"), ("assistant", "강물 " * 200)),
        chat(("user", "바위 " * 200), ("assistant", "b")),
    ]
    dataset = write(hub_of(door).workspace / "data", rows, "jsonl")
    told = looked_at(door, submit(door, "sft", dataset, "max_length: 64\noverlong: truncate\n"))
    assert (told["cut_off_lines"], told["masked_lines"]) == ([2], [3])
    told = looked_at(door, submit(door, "sft", dataset, "max_length: 64\noverlong: refuse\n"))
    assert told["type"] == "failed"
    assert "2 of 3 rows are longer than 64 tokens (line 2, 3)" in told["message"]


def test_a_template_that_leaves_a_role_out_is_refused_with_the_rows(door: TestClient) -> None:
    place = hub_of(door).workspace
    model = place / "models" / "silent"
    shutil.copytree(place / "models" / "tiny", model)
    (model / "chat_template.jinja").write_text(SILENT)
    system = chat(("system", "짧게"), ("user", "물"), ("assistant", "水"))
    dataset = write(place / "data", [FINE, system, FINE, system], "jsonl")
    answer = submit(door, "sft", dataset)
    assert looked_at(door, answer)["type"] == "validated"
    text = f"task_type: sft\nmodel: models/silent\ndataset: {dataset}\n"
    headers = {"Content-Type": "application/yaml"}
    told = looked_at(door, door.post("/train/config", content=text, headers=headers))
    assert told["type"] == "failed"
    assert told["message"].startswith("line 2: the chat template leaves out what the role system")
    assert told["message"].endswith("(and 1 more, line 4)")


def test_a_tokenizer_that_breaks_fails_its_job_and_no_other(door: TestClient) -> None:
    """A table of characters with a byte missing: the library panics, outside of Exception."""
    place = hub_of(door).workspace
    model = place / "models" / "broken"
    shutil.copytree(place / "models" / "tiny", model)
    table = sentencepiece.read(sentencepiece_model(**PLAIN_PIECES)).charsmap
    start = 4 + int.from_bytes(table[:4], "little")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Precompiled(table[:start] + table[start + 1 :])
    tokenizer.save(str(model / "tokenizer.json"))
    asked = chat(("user", "ｱ"), ("assistant", "ｱ" * 99))
    dataset = write(place / "data", [FINE, asked], "jsonl")
    text = f"task_type: sft\nmodel: models/broken\ndataset: {dataset}\n"
    headers = {"Content-Type": "application/yaml"}
    told = looked_at(door, door.post("/train/config", content=text, headers=headers))
    assert told["type"] == "failed"
    assert "the tokenizer breaks on a text" in told["message"]
    assert looked_at(door, submit(door, "sft", dataset, "max_length: 99\n"))["type"] == "validated"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_templates_of_known_models_leave_nothing_out(family: Family, tmp_path: Path) -> None:
    renderer = Renderer.load(family.write(tmp_path))
    for messages in conversations(family.has_system):
        assert renderer.unshown(messages) == []
    assert renderer.unshown([Message(role="user", content="a")]) == []


@pytest.mark.parametrize("method", ["sft", "task"])
def test_rows_that_say_the_same_are_warned_of_or_refused(door: TestClient, method: str) -> None:
    place = hub_of(door).workspace / "data"
    dataset = write(place, [FINE, FINE, chat(("user", "x"), ("assistant", "y"))], "jsonl")
    write_rows(place / "eval.jsonl", [chat(("user", "z"), ("assistant", "y")), FINE])

    def ask(more: str) -> Any:
        word = "method: sft" if method == "sft" else "task_type: sft"
        text = f"{word}\nmodel: models/tiny\ndataset: {dataset}\n{more}\n"
        headers = {"Content-Type": "application/yaml"}
        return door.post("/train/config", content=text, headers=headers)

    answer = ask("eval_dataset: data/eval.jsonl")
    told = looked_at(door, answer)
    [queued] = hub_of(door).events_after(answer.json()["job_id"], 0)[:1]
    assert "1 row with the words of an earlier row (line 2 as line 1)" in str(queued.data)
    overlap = "1 row of the validation set in the training set as well (line 2 as line 1)"
    assert overlap in str(queued.data) + str(told)
    refused = ask("duplicates: refuse")
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["dataset", "line", 2]
    refused = ask("eval_dataset: data/eval.jsonl\noverlap: refuse")
    assert refused.status_code == 422, refused.text
    assert refused.json()["detail"][0]["loc"] == ["eval_dataset", "line", 2]

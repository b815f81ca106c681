"""`tunesmith train SPEC.yaml`: a real trainer in the foreground, interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from task_files import document, sentencepiece_model
from train_fixtures import make_model, pairs, write_rows
from tunesmith import manifest
from tunesmith.cli import main
from tunesmith.cli.foreground import Foreground, _only_one
from tunesmith.cli.terminal import CommandError

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("작업")
    make_model(folder / "모델")
    write_rows(folder / "行.jsonl", [dict(row) for row in pairs(64)])
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def write_spec(name: str, epochs: float = 1, dataset: str = "行.jsonl") -> Path:
    path = Path(f"{name}.yaml")
    path.write_text(
        f"model: 모델\ndataset: {dataset}\nlora: {{rank: 2}}\n"
        f"optim: {{learning_rate: 2e-3, epochs: {epochs}, batch_size: 4}}\n",
        encoding="utf-8",
    )
    return path


def write_task(name: str, epochs: float) -> Path:
    """In the words of the contract's tasks."""
    path = Path(f"{name}.yaml")
    path.write_text(
        "task_type: sft\nmodel_name: 모델\ndataset: 行.jsonl\nmax_seq_length: 2048\n"
        f"learning_rate: 2e-3\nnum_train_epochs: {epochs}\nper_device_train_batch_size: 4\n",
        encoding="utf-8",
    )
    return path


def started(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith.cli", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )


def events_of(lines: Iterator[str] | list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def test_an_interrupted_training_goes_on_where_it_stopped(here: Path) -> None:
    write_task("긴", epochs=8)
    child = started("긴.yaml", "--json")
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line)["type"] == "step":
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    stopped = events_of(out.splitlines())[-1]
    assert stopped["type"] == "stopped"
    assert "the same command goes on" in err
    assert not Path("outputs/긴/model_final").exists()

    other = Path("changed.yaml")
    other.write_text(Path("긴.yaml").read_text("utf-8").replace("epochs: 8", "epochs: 7"), "utf-8")
    with pytest.raises(CommandError, match="another spec"):
        Foreground.prepare(other, Path("outputs/긴"))._take_up()

    again = started("긴.yaml", "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    steps = [one["step"] for one in events_of(out.splitlines()) if one["type"] == "step"]
    assert steps == list(range(stopped["step"] + 1, 129))
    assert f"going on from step {stopped['step']}" in err
    folder = here / "outputs" / "긴"
    manifest.verify(folder / "model_final")
    assert sorted(path.name for path in folder.iterdir()) == ["model_final", "model_final.log"]
    found = {path.name for path in (folder / "model_final").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= found
    assert "2,048 tokens were asked for" in (folder / "model_final.log").read_text("utf-8")


def test_faulty_data_is_code_five_and_names_the_line(capsys: Output) -> None:
    write_spec("faulty", dataset="broken.jsonl")
    assert main(["train", "faulty.yaml", "--out", "out/faulty"]) == 5
    err = capsys.readouterr().err
    assert "error: " in err
    assert "2" in err
    assert "hint: " in err
    assert not Path("out/faulty").exists()


def test_a_folder_that_is_not_ours_is_left_alone(capsys: Output) -> None:
    write_spec("careful")
    precious = Path("precious")
    precious.mkdir()
    (precious / "노트.txt").write_text("keep")
    assert main(["train", "careful.yaml", "--out", "precious"]) == 1
    assert "left alone" in capsys.readouterr().err
    assert [path.name for path in precious.iterdir()] == ["노트.txt"]
    assert main(["train", "careful.yaml", "--out", "careful.yaml"]) == 1
    assert "is a file" in capsys.readouterr().err


def test_inputs_that_are_missing_are_named_before_anything_is_made(capsys: Output) -> None:
    path = write_spec("lost", dataset="行.json")
    assert main(["train", str(path), "--out", "lost"]) == 3
    err = capsys.readouterr().err
    assert "dataset: nothing lies at '行.json'; did you mean '行.jsonl'?" in err
    assert not Path(".lost.train").exists()


def test_two_commands_do_not_train_into_one_folder(tmp_path: Path) -> None:
    other = pytest.raises(CommandError, match="another `tunesmith train`")
    with _only_one(tmp_path), other, _only_one(tmp_path):
        pass
    with _only_one(tmp_path):
        pass


def test_a_model_that_was_finished_but_not_placed_is_placed(here: Path, capsys: Output) -> None:
    write_spec("late")
    job = Foreground.prepare(Path("late.yaml"), Path("outputs/late"))
    made = job.work / "attempts" / "3" / "staging"
    made.mkdir(parents=True)
    (made / "weights").write_text("w")
    manifest.commit(made, made.parent / "artifact", "artifact")
    manifest.write_durably(
        job.work / "task.json", json.dumps(job._identity(), sort_keys=True).encode()
    )
    assert main(["train", "late.yaml"]) == 0
    assert (here / "outputs" / "late" / "weights").read_text() == "w"
    assert not job.work.exists()


def test_pretraining_in_the_foreground_keeps_the_tokenizer_it_began_with(here: Path) -> None:
    write_rows(here / "text.jsonl", [document(at) for at in range(8)])
    Path("t.model").write_bytes(sentencepiece_model())
    Path("글.yaml").write_text(
        "task_type: pretrain\nmodel: 모델\ndataset: text.jsonl\ntokenizer: t.model\n", "utf-8"
    )
    training = Foreground.prepare(Path("글.yaml"))
    training.work.mkdir(parents=True)
    packed = training.packed(training.work).tokenizer
    Path("t.model").write_bytes(b"changed")
    assert training.packed(training.work).tokenizer == packed
    assert main(["train", "글.yaml"]) == 0
    assert (here / "outputs" / "글" / "tokenizer.model").read_bytes() == sentencepiece_model()


def test_schema_and_example_need_no_file(capsys: Output) -> None:
    assert main(["train", "--schema"]) == 0
    assert "learning_rate" in json.dumps(json.loads(capsys.readouterr().out))
    assert main(["train", "--tasks"]) == 0
    assert "| `num_train_epochs` |" in capsys.readouterr().out
    assert main(["train", "--example"]) == 0
    assert "learning_rate: 2e-4" in capsys.readouterr().out


def test_an_estimate_and_a_probe_leave_nothing_behind(here: Path, capsys: Output) -> None:
    spec = write_spec("추정", epochs=2)
    before = sorted(here.iterdir())
    assert main(["train", str(spec), "--estimate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["steps"]) == (64, 32)
    assert main(["train", str(spec), "--probe"]) == 0
    shown = capsys.readouterr().out
    assert "32" in shown
    assert "a step on the 4 longest samples" in shown
    assert sorted(here.iterdir()) == before

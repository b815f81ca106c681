"""The command line against a real server: started, used, stopped with Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train_fixtures import make_model, pairs, write_rows
from tunesmith.cli import main

Output = pytest.CaptureFixture[str]
START_SECONDS = 60


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with a model, rows and a server of its own."""
    folder = tmp_path_factory.mktemp("공방")
    make_model(folder / "models" / "base")
    write_rows(folder / "훈련.jsonl", [dict(row) for row in pairs(32)])
    environment = {name: text for name, text in os.environ.items() if "TUNESMITH" not in name}
    with (folder / "up.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "up", "--port", "0"],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
            stdout=log,
            stderr=log,
        )
    note = folder / ".tunesmith" / "api.json"
    for _ in range(START_SECONDS * 20):
        if note.exists() or server.poll() is not None:
            break
        time.sleep(0.05)
    assert note.exists(), (folder / "up.log").read_text()
    yield folder
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0
    assert not note.exists()


@pytest.fixture(autouse=True)
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("TUNESMITH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(workspace)
    return workspace


def test_from_a_name_to_a_conversation(here: Path, capsys: Output) -> None:
    assert main(["models", "add", "팀/base", "models/base"]) == 0
    assert main(["data", "add", "행", "훈련.jsonl"]) == 0
    capsys.readouterr()
    assert main(["models", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "팀/base"

    line = ["train", "sft", "-m", "팀/base", "-d", "행", "--epochs", "1", "--wait"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    job_id = out.strip()
    assert len(job_id) == 8
    assert "step 8/8" in err
    assert "completed" in err

    assert main(["logs", job_id, "-f", "--tail", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["jobs", "show", job_id, "--json"]) == 0
    job = json.loads(capsys.readouterr().out)
    assert job["status"] == "completed"
    assert (here / job["output_dir"] / "adapter_model.safetensors").exists()
    assert main(["cancel", job_id]) == 1
    assert "has already ended" in capsys.readouterr().err

    ask = ["chat", job["fine_tuned_model"], "-p", "river stone 강물", "--max-tokens", "4"]
    assert main(ask) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_long_job_is_watched_and_cancelled(here: Path, capsys: Output) -> None:
    line = ["train", "sft", "-m", "models/base", "-d", "훈련.jsonl", "--epochs", "900", "--json"]
    assert main(line) == 0
    job_id = json.loads(capsys.readouterr().out)["job_id"]
    assert main(["cancel", job_id]) == 0
    capsys.readouterr()
    assert main(["jobs", "watch", job_id]) == 5
    assert f"{job_id} cancelled" in capsys.readouterr().err


def test_an_upload_goes_through_and_a_faulty_one_names_its_line(here: Path, capsys: Output) -> None:
    (here / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert main(["train", "sft", "-m", "models/base", "-d", "bad.jsonl", "--upload"]) == 1
    assert "2" in capsys.readouterr().err


def test_a_typo_in_a_name_is_answered_with_the_right_one(capsys: Output) -> None:
    assert main(["jobs", "show", "00000000"]) == 3
    assert main(["train", "sft", "-m", "팀/bse", "-d", "훈련.jsonl"]) == 3
    assert "error: " in capsys.readouterr().err


def test_keys_are_made_listed_and_revoked(capsys: Output) -> None:
    """Last, since the first key closes the door to callers without one."""
    assert main(["keys", "make", "--owner", "나", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("sk-")
    assert main(["keys", "ls"]) == 0
    assert made["key"] not in capsys.readouterr().out
    assert main(["jobs", "ls", "--api-key", made["key"]]) == 0
    assert main(["keys", "rm", made["id"]]) == 0
    assert main(["jobs", "ls", "--api-key", made["key"]]) == 4

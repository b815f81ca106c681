"""Commands as a user types them: exit codes, where the words go, errors in a line."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdk_fixtures import Wire, event, job, reply, serving, stream
from tunesmith.cli import main
from tunesmith.cli.doctor import Package, check_package, check_port, has_wal_fix, numbers
from tunesmith.settings import Settings

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("TUNESMITH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    with serving() as wire:
        monkeypatch.setenv("TUNESMITH_BASE_URL", wire.url)
        yield wire


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tunesmith.cli import main; main(['--help']);"
        "heavy = {'torch', 'httpx2', 'sqlalchemy', 'fastapi', 'yaml'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("up", "api", "worker", "train", "jobs", "logs", "cancel", "chat", "doctor"):
        assert command in done.stdout


def test_the_module_runs_and_tells_its_version() -> None:
    command = [sys.executable, "-m", "tunesmith.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tunesmith ")


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("jbs", 2, "did you mean 'jobs'?"),
        ("jobs ls --limt 3", 2, "--limit"),
        ("jobs ls --limit 0", 2, "greater than or equal to 1"),
        ("jobs ls --status lost", 2, "status"),
        ("chat", 2, "missing argument"),
        ("api --bell gong", 2, "gong"),
        ("up --port 99999", 2, "--port"),
        ("up --workspace ./nowhere", 2, "no folder"),
        ("train none.yaml", 3, "no file 'none.yaml'"),
        ("train --out x", 2, "no spec.yaml"),
        ("train sft -m m", 2, "--dataset"),
        ("train sft -m m -d d --set =1", 2, "field=value"),
        ("jobs ls --server nonsense", 2, "no address"),
        ("jobs submit none.yaml", 3, "no file 'none.yaml'"),
        ("models add 이름 ./nichts", 3, "nothing lies at 'nichts'"),
    ],
)
def test_bad_input_is_one_line_with_its_code(
    line: str, code: int, told: str, capsys: Output
) -> None:
    assert main(line.split()) == code
    out, err = capsys.readouterr()
    assert told in err.lower()
    assert err.startswith("error: ")
    assert out == ""
    assert "Traceback" not in err


def test_a_setting_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("TUNESMITH_PORT", "eighty")
    assert main(["doctor"]) == 2
    assert "setting port" in capsys.readouterr().err


def test_without_a_server_the_next_step_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        monkeypatch.setattr("tuning_sdk.retry._FIRST_WAIT_SECONDS", 0.001)
        assert main(["jobs", "ls", "--server", url]) == 1
    assert "hint: start a server with `tunesmith up`" in capsys.readouterr().err


def test_jobs_are_listed_for_readers_and_for_scripts(wire: Wire, capsys: Output) -> None:
    wire.on("GET /jobs", reply([job("completed"), job("failed", job_id="0f0f0f0f")]))
    assert main(["jobs", "ls"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["ID", "TYPE", "STATUS", "DONE", "MODEL", "AGE", "TOOK"]
    assert out[1].split()[:5] == ["a1b2c3d4", "sft", "completed", "100%", "팀/base"]
    assert main(["jobs", "ls", "--json", "--status", "failed", "--limit", "5"]) == 0
    out_text, err = capsys.readouterr()
    assert json.loads(out_text)[1]["job_id"] == "0f0f0f0f"
    assert err == ""
    assert wire.asked[-1].path == "/jobs?status=failed&limit=5"


def test_a_configuration_is_submitted_as_it_stands(wire: Wire, here: Path, capsys: Output) -> None:
    told = {"job_id": "a1b2c3d4", "status": "pending", "message": "KTO training job created"}
    wrong = {"loc": ["line", 1, "task_typ"], "msg": "unknown key"}
    wire.on("POST /train/config", reply(told), reply({"detail": [wrong]}, 422))
    (here / "설정.yaml").write_text("task_type: rl # 예\n", encoding="utf-8")
    assert main(["jobs", "submit", "설정.yaml", "--suffix", "mine", "--priority", "3"]) == 0
    assert capsys.readouterr().out == "a1b2c3d4\n"
    assert wire.asked[-1].body == "task_type: rl # 예\n".encode()
    assert wire.asked[-1].headers["content-type"] == "application/yaml"
    assert wire.asked[-1].path == "/train/config?priority=3&suffix=mine"
    assert main(["jobs", "submit", "설정.yaml"]) == 1
    assert "error: line 1, task_typ: unknown key\n" in capsys.readouterr().err


def test_an_unknown_job_brings_the_nearest_id(wire: Wire, capsys: Output) -> None:
    wire.on("GET /jobs", reply([job()]))
    for line in (["jobs", "show", "a1b2c3d5"], ["logs", "a1b2c3d5"], ["cancel", "a1b2c3d5"]):
        assert main(line) == 3
        assert "did you mean 'a1b2c3d4'?" in capsys.readouterr().err


def test_a_wrong_key_is_code_four(wire: Wire, capsys: Output) -> None:
    wire.on("GET /jobs", reply({"detail": "that key is not known"}, 401))
    assert main(["jobs", "ls", "--api-key", "sk-x"]) == 4
    assert "--api-key" in capsys.readouterr().err
    assert wire.asked[0].headers["authorization"] == "Bearer sk-x"


def test_watching_a_job_that_fails_is_code_five(wire: Wire, capsys: Output) -> None:
    failed = event(3, "failed", message="loss was not finite", hint="lower the learning rate")
    wire.on("GET /jobs/a1b2c3d4/events", stream(event(1, "queued"), failed))
    wire.on("GET /jobs/a1b2c3d4", reply(job("failed", error="loss was not finite")))
    assert main(["jobs", "watch", "a1b2c3d4"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "loss was not finite" in err
    assert "hint: lower the learning rate" in err
    assert main(["jobs", "watch", "a1b2c3d4", "--json"]) == 5
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["queued", "failed"]


def test_starting_preference_training_sends_what_was_said(wire: Wire, capsys: Output) -> None:
    wire.on("POST /train/dpo", reply({"job_id": "a1b2c3d4", "status": "pending"}))
    line = "train dpo -m outputs/sft -d 쌍.jsonl --beta 0.3 --loss ipo --set label_smoothing=0"
    assert main(line.split()) == 0
    assert capsys.readouterr().out == "a1b2c3d4\n"
    assert wire.of("POST /train/dpo")[0].json == {
        "model_name": "outputs/sft",
        "dataset_path": "쌍.jsonl",
        "beta": 0.3,
        "loss": "ipo",
        "label_smoothing": 0,
    }


def test_starting_a_job_sends_what_was_said(wire: Wire, capsys: Output, here: Path) -> None:
    wire.on("POST /train/sft", reply({"job_id": "a1b2c3d4", "status": "pending"}))
    wire.on("POST /upload/dataset", reply({"dataset_path": "data/행.jsonl", "num_samples": 2}))
    (here / "행.jsonl").write_text("{}\n")
    line = "train sft -m 팀/base -d 행.jsonl --upload --lr 2e-4 --full --set warmup_ratio=3e-2"
    line += " --sweep lora_r=4,8 --sweep use_dora=true,false"
    assert main(line.split()) == 0
    assert capsys.readouterr().out == "a1b2c3d4\n"
    assert wire.of("POST /train/sft")[0].json == {
        "model_name": "팀/base",
        "dataset_path": "data/행.jsonl",
        "learning_rate": 2e-4,
        "use_lora": False,
        "warmup_ratio": 0.03,
        "sweep": {"grid": {"lora_r": [4, 8], "use_dora": [True, False]}},
    }


def test_the_workspaces_own_server_gets_the_workspaces_token(here: Path, capsys: Output) -> None:
    home = here / ".tunesmith"
    home.mkdir()
    (home / "worker.token").write_text("token-of-the-workspace\n")
    inner = here / "deep" / "er"
    inner.mkdir(parents=True)
    os.chdir(inner)
    with serving() as wire, serving() as other:
        (home / "api.json").write_text(json.dumps({"url": wire.url, "pid": os.getpid()}))
        wire.on("GET /jobs", reply([]))
        other.on("GET /jobs", reply([]))
        assert main(["jobs", "ls"]) == 0
        assert main(["jobs", "ls", "--server", other.url]) == 0
        assert wire.asked[0].headers["authorization"] == "Bearer token-of-the-workspace"
        assert "authorization" not in other.asked[0].headers
    (home / "api.json").write_text("[" * 9000)
    assert main(["jobs", "ls"]) == 1
    assert "no server runs" in capsys.readouterr().err


def test_the_operators_commands_go_through_a_running_server(here: Path, capsys: Output) -> None:
    home = here / ".tunesmith"
    home.mkdir()
    (home / "worker.token").write_text("t0")
    with serving() as wire:
        (home / "api.json").write_text(json.dumps({"url": wire.url, "pid": os.getpid()}))
        wire.on("POST /internal/v1/models", reply({"name": "팀/b", "path": str(here)}, 201))
        wire.on("GET /internal/v1/models", reply([{"name": "팀/b", "path": "/x"}]))
        wire.on("DELETE /internal/v1/models/%ED%8C%80%2Fb", reply(None, 204))
        wire.on("POST /internal/v1/keys", reply({"id": "k1", "key": "sk-new"}, 201))
        assert main(["models", "add", "팀/b", "."]) == 0
        assert wire.asked[0].json == {"name": "팀/b", "path": str(here)}
        assert main(["models", "ls"]) == 0
        assert "팀/b  /x" in capsys.readouterr().out
        assert main(["models", "rm", "팀/b"]) == 0
        assert main(["models", "rm", "팀/bb"]) == 3
        assert "did you mean '팀/b'?" in capsys.readouterr().err
        assert main(["keys", "make", "--owner", "me"]) == 0
        assert capsys.readouterr().out == "sk-new\n"
        assert {one.headers["authorization"] for one in wire.asked} == {"Bearer t0"}


def test_a_log_is_printed_without_control_characters(wire: Wire, capsys: Output) -> None:
    lines = {"job_id": "a1b2c3d4", "logs": ["\x1b[31m빨강", "ok"], "total_lines": 2}
    wire.on("GET /jobs/a1b2c3d4/logs", reply(lines))
    assert main(["logs", "a1b2c3d4", "--tail", "2"]) == 0
    assert capsys.readouterr().out == "[31m빨강\nok\n"


def test_a_question_is_answered_while_it_comes(wire: Wire, capsys: Output) -> None:
    parts = [
        f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
        for text in ("안", "녕\x1b[2J")
    ]
    wire.on("POST /v1/chat/completions", stream(*parts, "data: [DONE]\n\n"))
    assert main(["chat", "팀/base", "-p", "hi", "--system", "짧게", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "안녕[2J\n"
    roles = [turn["role"] for turn in wire.asked[0].json["messages"]]
    assert roles == ["system", "user"]


def test_a_model_that_is_not_there_brings_the_nearest(wire: Wire, capsys: Output) -> None:
    wire.on("POST /v1/chat/completions", reply({"error": {"message": "no model 'bse'"}}, 404))
    wire.on("GET /v1/models", reply({"data": [{"id": "base"}]}))
    assert main(["chat", "bse", "-p", "hi"]) == 3
    assert "did you mean 'base'?" in capsys.readouterr().err


def test_the_doctor_reports_and_says_what_to_do(capsys: Output) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        port = door.getsockname()[1]
        assert main(["doctor", "--json", "--port", str(port)]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"python", "sqlite", "torch", "cores", "memory", "disk", "port"} <= checks.keys()
    assert checks["port"]["level"] == "error"
    assert "--port" in checks["port"]["advice"]
    assert checks["workspace"]["level"] == "ok"


def test_a_free_port_is_well(here: Path) -> None:
    assert check_port(Settings.read({}, workspace=here, port=0)).level == "ok"


def test_the_doctor_knows_the_floors() -> None:
    assert check_package(Package("pytest", (999,), "dev")).level == "error"
    assert check_package(Package("pytest", (1,), "dev")).level == "ok"
    assert check_package(Package("no-such-thing-here", (1,), "dev")).level == "warning"
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("5.3rc1") == (5, 3)
    fixed = ["3.51.3", "3.50.7", "3.44.6", "3.53.4", "4.0"]
    assert [has_wal_fix(numbers(version)) for version in fixed] == [True] * 5
    faulty = ["3.40.1", "3.51.2", "3.50.6", "3.44.5", "3.49.9", ""]
    assert [has_wal_fix(numbers(version)) for version in faulty] == [False] * 6

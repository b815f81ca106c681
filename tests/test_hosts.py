"""Journeys of worker hosts of their own, on this machine: real server, workers, trainers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts import Host
from house import House, build, preferences
from servers import free_port
from task_files import document, sentencepiece_model
from train_fixtures import write_rows

QUICK = {"num_epochs": 2, "save_steps": 10}
LONG = {"num_epochs": 8, "save_steps": 10}
ELSEWHERE = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
"""Run a command under another host's name, with a folder mounted under another path."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = build(tmp_path_factory.mktemp("house"))
    house.port = free_port()  # what a host was told stays true over a restart
    try:
        yield house.start("api", "--no-worker")
    finally:
        house.end()


@pytest.fixture(scope="module")
def host(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("멀리"), house.url, _token(house))
    try:
        yield made.start()
    finally:
        made.end()


def _token(house: House) -> str:
    return (house.home / "worker.token").read_text().strip()


def _output(house: House, job_id: str) -> Path:
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    return house.workspace / "outputs" / job_id


def test_what_a_host_of_its_own_makes_speaks_of_the_apis_paths(house: House, host: Host) -> None:
    first = _output(house, house.submit(**QUICK))
    second = _output(house, house.submit(model_name=f"outputs/{first.name}", **QUICK))
    base = str(house.workspace / "models" / "tiny")
    for output in (first, second):
        config = json.loads((output / "adapter_config.json").read_bytes())
        assert config["base_model_name_or_path"] == base
    assert json.loads((second / "training.json").read_bytes())["base_model"] == str(first)
    whole = _output(house, house.submit(use_lora=False, **QUICK))
    for output in (first, second, whole):
        for path in output.rglob("*"):
            assert str(host.folder).encode() not in path.read_bytes(), path
    house.wait(lambda: not list((host.home / "jobs").glob("*")))


def test_a_reward_model_and_its_base_come_to_a_host_of_its_own(house: House, host: Host) -> None:
    write_rows(house.workspace / "data" / "pairs.jsonl", preferences(8))
    asked = "model: models/tiny\ndataset: data/pairs.jsonl\noptim: {max_steps: 2}\n"
    made = _output(house, house.configure(f"method: reward\n{asked}"))
    rewards = f"rewards: [{{kind: model, model: outputs/{made.name}}}]\n"
    size = "max_length: 64\nmax_completion_length: 4\nlora: null\n"
    policy = _output(house, house.configure(f"method: grpo\n{asked}{rewards}{size}"))
    for path in policy.rglob("*"):
        assert not path.is_file() or str(host.folder).encode() not in path.read_bytes(), path


def test_a_tokenizer_goes_to_a_host_of_its_own_with_the_data(house: House, host: Host) -> None:
    (house.workspace / "t.model").write_bytes(sentencepiece_model())
    write_rows(house.workspace / "data" / "text.jsonl", [document(at) for at in range(8)])
    text = "task_type: pretrain\nmodel: models/tiny\ndata: data/text.jsonl\ntokenizer: t.model\n"
    output = _output(house, house.configure(text))
    assert (output / "tokenizer.model").read_bytes() == sentencepiece_model()


def test_the_log_of_a_host_of_its_own_is_the_jobs_log(house: House, host: Host) -> None:
    job_id = house.submit(**QUICK)
    _output(house, job_id)
    log = (house.workspace / "outputs" / "training_logs" / f"job_{job_id}.log").read_text()
    assert log.startswith("[attempt 1 starts")
    steps = [line for line in log.splitlines() if line.startswith("step ") and "loss" in line]
    assert len(steps) == len(set(steps)) == 32
    assert "finished at step 32" in log


def test_a_host_that_is_stopped_leaves_its_last_checkpoint_to_the_next(
    house: House, host: Host
) -> None:
    job_id = house.submit(**LONG)
    house.wait_event(job_id, "checkpointed")
    [trainer] = host.trainers()
    trainer.suspend()  # or it might be done before it hears of the stop
    assert host.process is not None
    host.process.send_signal(signal.SIGTERM)
    house.wait(lambda: "stopping: 1 attempts" in host.log)
    trainer.resume()
    host.stop()
    requeued = house.wait_event(job_id, "requeued")
    assert requeued["data"]["reason"] == "stopped"
    steps = [event["data"]["step"] for event in house.events(job_id) if event["type"] == "step"]
    host.start()
    _output(house, job_id)
    started = house.wait_event(job_id, "started", last=True)
    assert started["data"]["start_step"] == steps[-1]


def test_a_model_made_while_the_api_was_away_arrives_after_the_worker_was_killed_too(
    house: House, host: Host
) -> None:
    job_id = house.submit(**QUICK)
    house.wait_event(job_id, "started")
    assert house.process is not None
    house.process.kill()
    house.process.wait()
    receipt = host.home / "jobs" / job_id / "attempts" / "1" / "exit.json"
    house.wait(receipt.exists)
    host.kill()
    [parcel] = json.loads(receipt.read_bytes())["parcels"]
    assert parcel["kind"] == "artifact"
    house.start("api", "--no-worker")
    host.over = {"TUNESMITH_SHOULD_FORK_TRAINERS": "0"}  # it has none to start
    host.start()
    _output(house, job_id)
    assert house.job(job_id)["attempts"] == 1
    house.wait(lambda: not receipt.exists())


def test_a_host_that_sees_the_folder_under_another_path_uses_it(
    house: House, host: Host, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can mount a folder under another path")
    host.stop()
    mounted = tmp_path / "따로"
    mounted.mkdir()
    words = ("other-host", str(house.workspace), str(mounted))
    other = Host(mounted, house.url, _token(house))
    other.prefix = ("unshare", "-m", "-u", "sh", "-c", ELSEWHERE, "-", *words)
    try:
        other.start()
        first = _output(house, house.submit(**QUICK))
        job_id = house.submit(model_name=f"outputs/{first.name}", **QUICK)
        second = _output(house, job_id)
        made = [event["data"]["path"] for event in house.events(job_id) if _is_checkpoint(event)]
        assert made
        assert all(path.startswith(str(house.home)) for path in made)
        config = json.loads((second / "adapter_config.json").read_bytes())
        assert config["base_model_name_or_path"] == str(house.workspace / "models" / "tiny")
        assert not list((house.home / "jobs" / job_id / "attempts" / "1").glob(".incoming"))
    finally:
        other.end()


def _is_checkpoint(event: dict[str, object]) -> bool:
    return event["type"] == "checkpointed"


def _worker(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")
    }
    return subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", "worker", "--workspace", str(tmp_path), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_worker_says_what_is_wrong_with_its_first_words(house: House, tmp_path: Path) -> None:
    without = _worker(tmp_path, "--server", house.url)
    assert without.returncode == 2
    assert "tunesmith keys create --worker" in without.stderr
    wrong = _worker(tmp_path, "--server", house.url, "--token", "sk-wrong")
    assert wrong.returncode == 1
    assert "refuses this key" in wrong.stderr
    assert "sk-wrong" not in wrong.stderr
    typed = _worker(tmp_path, "--server", "api.example", "--token", "sk-x")
    assert typed.returncode == 1
    assert "http://HOST:PORT" in typed.stderr


def test_a_worker_waits_for_an_api_that_is_not_there_yet(tmp_path: Path) -> None:
    host = Host(tmp_path, f"http://127.0.0.1:{free_port()}", "sk-x")
    try:
        host.start()
        House(tmp_path).wait(lambda: "does not answer" in host.log)
        assert host.process is not None
        assert host.process.poll() is None
        host.process.send_signal(signal.SIGINT)
        assert host.process.wait(60) in (0, 130)
    finally:
        host.end()

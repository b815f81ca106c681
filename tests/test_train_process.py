"""The trainer as a process: its pipes, its signals, and the process it is forked from."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train_fixtures import (
    Events,
    Forker,
    Place,
    is_alive,
    make_model,
    pairs,
    sft,
    write_rows,
)
from tunesmith import manifest
from tunesmith.spec.train import Lora, Run

COMMAND = [sys.executable, "-m", "tunesmith.train"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
EACH_STEP = Run(save_steps=1, keep_checkpoints=3, save_seconds=3600)


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    model = make_model(folder / "model")
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(60)))


def newest_whole(attempt_dir):
    """As a worker does it: the newest checkpoint that verifies."""
    found = sorted(Path(attempt_dir, "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    for folder in reversed(found):
        try:
            manifest.verify(folder)
        except manifest.BrokenManifest:
            continue
        return str(folder)
    return None


def weights_of(events: Events):
    (path,) = Path(events.last["artifact"]).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("lora", [None, Lora(rank=4, dropout=0.2)], ids=["full", "lora"])
def test_a_trainer_killed_at_random_moments_ends_with_the_same_bits(forker, place, lora):
    chance = random.Random(11)
    spec = sft(lora, batch_size=2, epochs=1, run=EACH_STEP)
    code, whole = forker.run(place.task(spec))
    assert code == 0
    resume, losses = None, {}
    for _ in range(4):
        child = forker.fork(place.task(spec, resume_from=resume))
        child.wait_for("step", 2 + chance.randrange(4))
        time.sleep(chance.random() * 0.02)
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        losses |= child.events.losses
        resume = newest_whole(child.events_path.with_suffix("")) or resume
    code, last = forker.run(place.task(spec, resume_from=resume))
    assert code == 0
    assert 2 < last.of("started")[0]["start_step"] < 29
    assert losses | last.losses == whole.losses
    expected, found = weights_of(whole), weights_of(last)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sigterm_brings_a_checkpoint_an_end_and_status_0(forker, place):
    child = forker.fork(place.task(sft(max_steps=100_000, epochs=9999)))
    child.wait_for("step", 3)
    child.signal(signal.SIGTERM)
    assert child.wait() == 0
    kinds = [event["type"] for event in child.events.all]
    assert kinds[-2:] == ["checkpointed", "stopped"]
    step = child.events.last["step"]
    told = child.events.of("checkpointed")[-1]
    assert (told["step"], told["step"]) == (step, max(child.events.losses))
    manifest.verify(Path(told["path"]), told["manifest_sha256"])


def test_sigusr2_brings_a_checkpoint_and_sigusr1_the_stacks(forker, place):
    child = forker.fork(place.task(sft(max_steps=100_000, epochs=9999)))
    child.wait_for("step", 2)
    child.signal(signal.SIGUSR2)
    child.wait_for("checkpointed")
    child.signal(signal.SIGUSR1)
    said = len(child.events.of("step"))
    child.wait_for("step", said + 2)
    assert "in _step" in child.log.read_text()
    child.signal(signal.SIGTERM)
    assert child.wait() == 0


def test_a_failure_is_an_event_a_traceback_and_status_1(forker, place):
    task = place.task(sft(max_length=8, overlong="refuse"))
    child = forker.fork(task)
    assert child.wait() == 1
    failed = child.events.last
    assert failed["type"] == "failed"
    assert failed["failure_class"] == "data_error"
    assert "over max_length 8" in failed["message"]
    assert failed["hint"]
    assert "Traceback" in child.log.read_text()


def test_a_full_disk_costs_the_newest_checkpoint_then_the_job_but_no_older_checkpoint(
    forker, place
):
    """A limit on the size of a file stands in for the disk: no file of weights fits under it."""
    run = Run(save_steps=20, save_seconds=3600)
    child = forker.fork(place.task(sft(epochs=99, batch_size=60, max_steps=60, run=run)))
    child.wait_for("checkpointed")
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    assert child.wait() == 1
    events = child.events
    assert events.last["failure_class"] == "disk_full"
    assert [event["step"] for event in events.of("step")][-1] == 60
    assert "checkpoint_failed" in {event["code"] for event in events.of("notice")}
    told = events.of("checkpointed")[-1]
    manifest.verify(Path(told["path"]), told["manifest_sha256"])
    attempt = Path(told["path"]).parents[1]
    assert {path.name for path in attempt.iterdir()} == {"checkpoints"}
    assert {path.name for path in (attempt / "checkpoints").iterdir()} == {"step-20"}


def test_the_trainer_runs_by_hand_and_what_libraries_print_goes_to_the_log(place):
    task = place.task(sft(max_steps=2))
    done = subprocess.run(
        COMMAND, input=task.model_dump_json().encode(), capture_output=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr.decode()
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["type"] for event in events][-1] == "finished"
    assert done.stdout.isascii()
    assert b"step 2/2" in done.stderr


@pytest.mark.parametrize("body", [b"", b"{", b'{"job_id": "x"}', "강물".encode(), b"\xff\xfe"])
def test_a_task_that_cannot_be_read_is_a_user_error(forker, tmp_path, body):
    given, said = tmp_path / "task", tmp_path / "events"
    given.write_bytes(body)
    with given.open("rb") as stdin, said.open("wb") as stdout, open(os.devnull, "wb") as stderr:
        request = {"id": "bad", "module": "tunesmith.train"}
        descriptors = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
        child = forker.send(request, descriptors)
    assert forker.end_of(child["pid"]) == 1
    (event,) = map(json.loads, said.read_text().splitlines())
    assert event["failure_class"] == "user_error"
    assert "the task cannot be read" in event["message"]


def test_a_trainer_whose_events_nobody_reads_ends_without_a_word(forker, place):
    given, log = place.folder / "unread.task", place.folder / "unread.log"
    given.write_text(place.task(sft()).model_dump_json(), encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    with given.open("rb") as stdin, log.open("wb") as stderr:
        request = {"id": "unread", "module": "tunesmith.train"}
        child = forker.send(request, [stdin.fileno(), writer, stderr.fileno()])
    os.close(writer)
    assert forker.end_of(child["pid"]) == 1
    assert "Traceback" not in log.read_text()


def test_the_forking_process_refuses_what_it_does_not_know(forker):
    with open(os.devnull) as nothing:
        descriptors = [nothing.fileno()] * 3
        answer = forker.send({"id": 5, "module": "os", "argv": []}, descriptors)
        assert answer["id"] == 5
        assert "tunesmith.train" in answer["error"]
        answer = forker.send({"id": 6, "module": "tunesmith.train"}, descriptors[:2])
        assert "2 descriptors" in answer["error"]
        assert "error" in forker.send({"id": 7, "module": "tunesmith.train", "x": 1}, descriptors)
    threads = os.listdir(f"/proc/{forker.process.pid}/task")
    assert len(threads) == 1


def test_forked_trainers_lead_sessions_of_their_own_and_hold_no_descriptor_of_the_parent(
    forker, place
):
    child = forker.fork(place.task(sft(max_steps=100_000, epochs=9999)))
    child.wait_for("step")
    assert os.getsid(child.pid) == child.pid
    held = [os.readlink(f"/proc/{child.pid}/fd/{n}") for n in os.listdir(f"/proc/{child.pid}/fd")]
    assert not [name for name in held if name.startswith("socket:")]
    assert len(held) <= 6
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("how", ["its socket closes", "it is killed"])
def test_trainers_die_with_the_process_they_were_forked_from(place, how):
    forker = Forker()
    children = [forker.fork(place.task(sft(max_steps=100_000, epochs=9999))) for _ in range(2)]
    for child in children:
        child.wait_for("step")
    if how == "it is killed":
        forker.process.kill()
    forker.close()
    deadline = time.monotonic() + 60
    while any(is_alive(child.pid) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)

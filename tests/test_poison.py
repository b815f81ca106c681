"""Trainers that take a worker's patience: killed for memory, babbling, silent, saying nonsense."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from api_fixtures import ASKED, ONE, make_workspace, open_door
from house import House, open_house
from tunesmith.work import memory
from tunesmith.work.trainer import MAX_COMPLAINTS
from work_fixtures import Api, Bench, an_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with an_api(tmp_path) as answering:
        yield answering


@pytest.fixture
def bench(tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return Bench(tmp_path, api)


# memory


def a_kernel(place: Path, kind: str) -> tuple[Path, Path, Path]:
    """What it shows of itself, in files: processes, groups, and the one that counts kills."""
    proc, groups = place / "proc", place / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\n")
    (proc / "vmstat").write_text("pgfault 12\n" + ("oom_kill 3\n" if kind == "host" else ""))
    lines, counter = "", proc / "vmstat"
    if kind == "version 2":
        lines, counter = "0::/작업/w\n", groups / "작업" / "w" / "memory.events"
    elif kind == "version 2 in a container":
        lines, counter = "0::/not/seen/here\n", groups / "memory.events"
    elif kind == "version 1":
        lines = "5:cpu:/\n4:memory,x:/w\n0::/\n"
        counter = groups / "memory" / "w" / "memory.oom_control"
    (proc / "self" / "cgroup").write_text(lines)
    counter.parent.mkdir(parents=True, exist_ok=True)
    counter.write_text("pgfault 1\noom_kill 3\n")
    if kind != "host":
        limit = "memory.limit_in_bytes" if "1" in kind else "memory.max"
        (counter.parent / limit).write_text("2000000000\n")
    return proc, groups, counter


@pytest.mark.parametrize("kind", ["host", "version 1", "version 2", "version 2 in a container"])
def test_a_kill_for_memory_is_told_from_another(tmp_path: Path, kind: str) -> None:
    proc, groups, counter = a_kernel(tmp_path, kind)
    (proc / "7").mkdir()
    (proc / "7" / "status").write_text("Name:\tx\nVmHWM:\t 1500000 kB\n")
    watch = memory.Watch(proc, groups)
    watch.look(7)
    assert not watch.has_killed()
    counter.write_text("pgfault 1\noom_kill 4\n")
    assert watch.has_killed()
    limit = "16.38 GB" if kind == "host" else "2.00 GB"
    assert watch.sentence().endswith(f"it held 1.54 GB, of {limit} in all")


def test_a_kernel_that_counts_nothing_is_never_blamed(tmp_path: Path) -> None:
    watch = memory.Watch(tmp_path / "proc", tmp_path / "groups")
    watch.look(1)
    assert not watch.has_killed()


def test_a_trainer_that_the_kernel_killed_for_memory_fails_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that raises the kernel's count before it kills itself stands in for the kernel."""
    proc, groups, counter = a_kernel(bench.folder, "version 2")
    monkeypatch.setattr(memory.Watch, "__init__", _watch_in(proc, groups))
    script = f"""
say(type="started", pid=1, plan={{"threads": 1}}, total_steps=9, parameters=1,
    trainable_parameters=1)
step(1, tokens=10)
open({str(counter)!r}, "w").write("oom_kill 4\\n")
os.kill(os.getpid(), 9)
"""
    outcome = bench.run(script)
    assert outcome["failure_class"] == "oom_host"
    assert "of 2.00 GB in all" in outcome["message"]
    *_, replanned, notice = [event for _, event in bench.api.events]
    assert replanned["plan"]["micro_batch_tokens"] == 5
    assert "passes of the next attempt have up to 5 tokens" in notice["message"]
    assert bench.run("os.kill(os.getpid(), 9)")["failure_class"] == "signal"


def _watch_in(proc: Path, groups: Path) -> Any:
    real = memory.Watch.__init__

    def init(self: memory.Watch) -> None:
        real(self, proc, groups)

    return init


# words


def test_a_trainer_that_babbles_without_end_is_not_held_up_and_fills_no_disk(
    bench: Bench,
) -> None:
    script = """
block = bytes(range(256)) * 4096
for n in range(128):
    sys.stderr.buffer.write(block)
    if n % 8 == 0: os.write(1, block[:200_000].replace(b"\\n", b" ") + b"\\n")
step(1)
finish()
"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert bench.run(script)["kind"] == "succeeded"
    assert bench.log.stat().st_size <= bench.max_log_bytes + 200
    assert {path.name for path in bench.log.parent.iterdir()} == {bench.log.name}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    kinds = [event["type"] for _, event in bench.api.events]
    assert kinds == ["notice"] * MAX_COMPLAINTS + ["step"]


def test_any_log_is_answered_as_strict_json_of_bounded_size(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    nasty = [
        b"\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07",
        b"10%\r20%\r100% done \xf0\x9f\x8c\x8a",
        bytes(range(256)),
        "강물 水 \u202e\u0000 x".encode(),
        b"\xed\xa0\x80 half a pair",
        b"x" * (8 << 20),
        b"\xff" * (1 << 20),
    ]
    with open_door(workspace, reserve_bytes=0) as door:
        job_id = door.post("/train/sft", json=ASKED, headers=ONE).json()["job_id"]
        place = workspace / "outputs" / "training_logs" / f"job_{job_id}.log"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"\n".join(nasty) + b"\nlast \xe6\xb0\xb4\n" + b"unfinished")
        for tail in (0, 1, 5, 100, 10**9):
            reply = door.get(f"/jobs/{job_id}/logs?tail={tail}", headers=ONE)
            assert reply.status_code == 200
            body = json.loads(reply.content.decode("utf-8", "strict"))
            assert body["logs"][-1] == "last 水"
            assert len(reply.content) < 2 << 20
            for line in body["logs"]:
                assert not any(ord(char) < 32 and char != "\t" for char in line)
                assert "\x1b" not in line


# a whole house


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    over = {
        "TUNESMITH_MAX_LAPSES": "2",
        "TUNESMITH_LEASE_SECONDS": "600",
        "TUNESMITH_REAPER_SECONDS": "60",
    }
    with open_house(tmp_path_factory.mktemp("poison"), **over) as opened:
        yield opened


def test_a_job_that_dies_each_time_is_given_up_with_its_count(house: House) -> None:
    job_id = house.submit(num_epochs=10_000)
    for fence in (1, 2):
        house.wait(lambda fence=fence: last_start(house, job_id)[0] == fence)
        psutil.Process(last_start(house, job_id)[1]).send_signal(signal.SIGKILL)
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("failed", 2), job
    failed = house.wait_event(job_id, "failed")
    assert failed["data"]["failure_class"] == "signal"
    assert "killed by SIGKILL (2 attempts in a row failed" in failed["data"]["message"]


def last_start(house: House, job_id: str) -> tuple[int, int]:
    """Fence and process of the newest attempt that has begun."""
    starts = [event for event in house.events(job_id) if event["type"] == "started"]
    return (starts[-1]["fence"], starts[-1]["data"]["pid"]) if starts else (0, 0)


def test_after_a_reboot_of_its_host_a_job_goes_on_without_waiting_for_its_lease(
    house: House,
) -> None:
    """All processes gone at once, and a new worker with another boot."""
    job_id = house.submit(num_epochs=8, save_steps=20)
    house.wait_event(job_id, "checkpointed")
    assert house.process is not None
    house.process.kill()
    house.process.wait()
    house.kill(*house.children())
    house.wait(lambda: not house.children())
    house.start()
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 2), job
    starts = [event for event in house.events(job_id) if event["type"] == "started"]
    assert starts[-1]["data"]["start_step"] >= 20

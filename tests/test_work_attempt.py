"""An attempt under the worker's supervision: real children, a scripted trainer, a small API."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tunesmith.spec.hands import EngineOrder
from tunesmith.spec.pipe import KNOWN
from tunesmith.work import engines as engines_module
from tunesmith.work import fork
from tunesmith.work import gate as gate_module
from tunesmith.work.engines import Engines
from tunesmith.work.fork import Child, Forker
from tunesmith.work.receipt import NAME
from tunesmith.work.session import members
from tunesmith.work.wire import Wire
from work_fixtures import Api, Bench, an_api, is_alive, until


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with an_api(tmp_path) as api:
        yield Bench(tmp_path, api)


def kinds(api: Api) -> list[str]:
    return [event["type"] for _, event in api.events]


def step_numbers(api: Api) -> list[int]:
    return [event["step"] for _, event in api.events if event["type"] == "step"]


def test_what_the_trainer_says_arrives_in_order_and_then_its_end(bench: Bench) -> None:
    script = """
for n in range(1, 2501): step(n)
print("한국어 中文 🌊", file=sys.stderr)
finish(2500)
"""
    outcome = bench.run(script)
    assert (outcome["kind"], outcome["step"]) == ("succeeded", 2500)
    assert step_numbers(bench.api) == list(range(1, 2501))
    assert "한국어 中文 🌊" in bench.log.read_text(encoding="utf-8")
    assert not (bench.folder / "attempts" / "1" / NAME).exists()


@pytest.mark.parametrize(
    ("script", "failure", "told"),
    [
        ("sys.exit(3)", "no_artifact", "status 3"),
        ("os.kill(os.getpid(), 9)", "signal", "SIGKILL"),
        ("os.kill(os.getpid(), 40)", "signal", "signal 40"),
        ("say(type='failed', failure_class='nan_loss', message='m', hint='h')", "nan_loss", "m"),
    ],
)
def test_each_end_is_told_for_what_it_is(
    bench: Bench, script: str, failure: str, told: str
) -> None:
    outcome = bench.run(script)
    assert outcome["failure_class"] == failure
    assert told in outcome["message"]


def test_a_trainer_that_has_finished_and_does_not_leave_has_still_succeeded(bench: Bench) -> None:
    bench.leave_seconds = 0.2
    bench.stall_seconds = 1
    assert bench.run("finish(4); time.sleep(600)")["kind"] == "succeeded"


def test_a_trainer_that_closes_its_pipe_and_goes_on_is_ended(bench: Bench) -> None:
    bench.leave_seconds = 0.2
    outcome = bench.run("step(1); os.close(1); time.sleep(600)")
    assert outcome["kind"] == "failed"
    assert step_numbers(bench.api) == [1]


def test_a_grandchild_that_holds_the_pipes_does_not_hold_the_job(bench: Bench) -> None:
    """One in the session is killed with it; one that has left the session is waited for no more."""
    inside = 'subprocess.Popen(["sleep", "600"]); finish()'
    assert bench.run(inside)["kind"] == "succeeded"
    assert bench.run(inside.replace("]", "], start_new_session=True"), fence=2)["kind"] == (
        "succeeded"
    )
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", "600"] and str(bench.folder) in str(
            process.environ().get("PYTHONPATH")
        ):
            process.kill()


def test_a_stalled_trainer_leaves_its_stacks_in_the_log(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.work.trainer.DUMP_SECONDS", 0.5)
    bench.stall_seconds = 1
    script = """
import faulthandler
faulthandler.register(signal.SIGUSR1)
def waits_for_ever(): time.sleep(600)
waits_for_ever()
"""
    outcome = bench.run(script)
    assert outcome["failure_class"] == "stalled"
    assert "waits_for_ever" in bench.log.read_text()


def test_what_is_no_event_is_left_out_and_the_rest_arrives(bench: Bench) -> None:
    script = """
step(1)
os.write(1, b"\\xff\\x00 what is this\\n" * 100)
os.write(1, b"{}\\n[]\\nnull\\n" + b"[" * 5000 + b"\\n")
say(type="notice", code="big", message="m", detail={"a": "x" * 200_000})
for _ in range(20): os.write(1, b"y" * 100_000)
os.write(1, b"\\n")
os.write(1, json.dumps({"type": "notice", "code": "x", "message": "nan"}).encode()[:-1])
os.write(1, b', "detail": {"a": NaN, "b": 1e999}}\\n')
step(2)
finish(2)
"""
    assert bench.run(script)["kind"] == "succeeded"
    assert step_numbers(bench.api) == [1, 2]
    codes = [event["code"] for _, event in bench.api.events if event["type"] == "notice"]
    assert (codes[0], codes[-1], set(codes)) == ("bad_event", "x", {"bad_event", "x"})
    assert json.loads(json.dumps(bench.api.events, allow_nan=False))


def test_a_log_that_cannot_be_written_is_an_outcome(bench: Bench) -> None:
    (bench.folder / "logs").write_text("a file is in the way")
    outcome = bench.run("finish()")
    assert outcome["failure_class"] == "infra_lost"
    assert "cannot start" in outcome["message"]


def test_the_trainer_is_told_which_checkpoint_the_api_knows_of(bench: Bench) -> None:
    """Once it is stored there, not when it is said."""
    api, known = bench.api, bench.folder / "attempts" / "1" / KNOWN

    async def drive(attempt: Any, task: Any) -> None:
        await until(known.exists)
        assert known.read_text() == "step-1"
        api.answer = 503, ""
        (bench.folder / "on").touch()
        await until(lambda: len(attempt._spool) == 2)
        assert known.read_text() == "step-1"
        api.answer = None
        await until(lambda: known.read_text() == "step-3")
        (bench.folder / "off").touch()

    made = 'type="checkpointed", manifest_sha256="0" * 64, size_bytes=1'
    script = f"""
os.makedirs(task["attempt_dir"] + "/checkpoints", exist_ok=True)
def save(n): say(step=n, path=task["attempt_dir"] + f"/checkpoints/step-{{n}}", {made})
save(1)
while not os.path.exists("{bench.folder}/on"): time.sleep(0.01)
save(2); save(3)
while not os.path.exists("{bench.folder}/off"): time.sleep(0.01)
finish(3)
"""
    driven(bench, script, drive)
    assert [outcome["kind"] for outcome in api.outcomes] == ["succeeded"]


def test_a_flood_of_log_stays_under_the_cap_and_does_not_hold_the_trainer_up(bench: Bench) -> None:
    script = """
for n in range(64): sys.stderr.buffer.write(bytes(range(256)) * 4096)
sys.stderr.write("the end")
finish()
"""
    assert bench.run(script)["kind"] == "succeeded"
    assert bench.log.stat().st_size <= (1 << 20) + 200
    assert bench.log.read_bytes().endswith(b"the end")


def driven(bench: Bench, script: str, drive: Any, **over: Any) -> None:
    """Run an attempt, and `drive(attempt, task)` beside it."""

    async def both() -> None:
        attempt = bench.attempt(script, **over)
        task = asyncio.create_task(attempt.run())
        await drive(attempt, task)
        await asyncio.wait_for(task, 60)
        await attempt.wire.close()

    asyncio.run(both())


def test_events_of_a_long_absence_are_kept_in_order_and_none_is_doubled(bench: Bench) -> None:
    api = bench.api

    async def drive(attempt: Any, task: Any) -> None:
        await until(lambda: len(api.events) >= 1)
        api.answer = 503, ""
        await until(lambda: len(attempt._spool) >= 3000)
        api.answer = 200, "<html>another server</html>"
        await until(lambda: attempt.is_delivering)
        receipt = bench.folder / "attempts" / "1" / NAME
        await until(receipt.exists)
        api.answer = None

    script = "step(1); time.sleep(1)\nfor n in range(2, 3002): step(n)\nfinish(3001)"
    driven(bench, script, drive)
    assert step_numbers(api) == list(range(1, 3002))
    assert [outcome["kind"] for outcome in api.outcomes] == ["succeeded"]


def test_the_lease_is_kept_while_the_api_reads_a_large_artifact(bench: Bench) -> None:
    api = bench.api
    api.finish_waits.clear()

    async def drive(attempt: Any, task: Any) -> None:
        await until(lambda: attempt.is_delivering)
        seen = api.reports
        await until(lambda: api.reports >= seen + 5)
        assert not task.done()
        api.finish_waits.set()

    driven(bench, "finish()", drive)
    assert len(api.outcomes) == 1


def test_a_stop_is_kind_at_first_and_force_does_not_wait(bench: Bench) -> None:
    api = bench.api
    kind = """
signal.signal(signal.SIGTERM, lambda *_: (say(type="stopped", step=5), os._exit(0)))
step(1); time.sleep(600)
"""

    async def cancel(attempt: Any, task: Any) -> None:
        await until(lambda: api.events)
        api.orders = {"stop": "cancel", "stop_in_seconds": 60}

    driven(bench, kind, cancel)
    assert (api.outcomes[-1]["kind"], api.outcomes[-1]["step"]) == ("stopped", 5)

    async def insist(attempt: Any, task: Any) -> None:
        seen = len(api.events)
        await until(lambda: len(api.events) > seen)
        api.orders = {"stop": "cancel", "stop_in_seconds": 600}
        await until(lambda: attempt.trainer.halt.is_set())
        attempt.nudge()
        attempt.stop(600)
        api.orders = {"stop": "force"}

    api.events.clear()
    api.orders = {}
    driven(bench, "signal.signal(15, signal.SIG_IGN); step(1); time.sleep(600)", insist, fence=2)
    assert api.outcomes[-1]["kind"] == "stopped"


def test_a_stop_before_the_child_exists_starts_none(bench: Bench) -> None:
    async def drive(attempt: Any, task: Any) -> None:
        attempt.stop(30)

    driven(bench, "open('started', 'w'); finish()", drive)
    assert bench.api.outcomes[-1]["kind"] == "stopped"
    assert not bench.log.exists() or "starts" not in bench.log.read_text()


def test_a_fenced_attempt_is_killed_and_says_no_more(bench: Bench) -> None:
    said = {"error": {"message": "no", "type": "x", "param": None, "code": "fenced"}}
    pids: list[int] = []

    async def drive(attempt: Any, task: Any) -> None:
        await until(lambda: bench.api.events)
        pids.append(attempt.trainer.child.pid)
        bench.api.answer = 409, json.dumps(said)

    driven(bench, "signal.signal(15, signal.SIG_IGN); step(1); time.sleep(600)", drive)
    assert bench.api.outcomes == []
    assert not is_alive(pids[0])


def test_a_stream_of_events_is_a_few_reports(bench: Bench) -> None:
    """Each report is a commit on the other side: events wait for company."""
    script = "for n in range(1, 301): step(n); time.sleep(0.005)\nfinish(300)"
    bench.heartbeat_seconds = 5
    bench.run(script.replace("; time", "\n    time").replace(": step", ":\n    step"))
    assert step_numbers(bench.api) == list(range(1, 301))
    assert bench.api.reports <= 20


def test_attempts_leave_no_descriptor_and_no_process_behind(bench: Bench) -> None:
    process = psutil.Process()
    before = set(process.children())  # a server that other tests share, for one

    async def many() -> None:
        counts = []
        for fence in range(1, 13):
            attempt = bench.attempt('subprocess.Popen(["sleep", "60"]); finish()', fence)
            await attempt.run()
            await attempt.wire.close()
            await asyncio.sleep(0.05)
            counts.append(process.num_fds())
        assert counts[-1] <= counts[1] + 1, counts
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(many())
    left = set(process.children()) - before
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left)


# engines


ENGINE = """
import json, os, signal, sys, time
def say(**event): print(json.dumps(event), flush=True)
"""


def engines(bench: Bench, script: str) -> Engines:
    (bench.folder / "scripted_engine.py").write_text(ENGINE + script)
    forker = Forker(False, bench.folder / "zygote.log")
    return Engines("w", Wire(bench.folder), forker, 1 << 20, "scripted_engine")


def start_order(bench: Bench, name: str = "engine-1", **over: Any) -> EngineOrder:
    log = str(bench.folder / f"{name}.log")
    order = EngineOrder(id=name, action="start", key="sk-비밀".encode().hex(), log_path=log)
    return order.model_copy(update=over)


def engine_child(found: Engines) -> Child:
    (engine,) = found._engines.values()
    assert engine.child is not None
    return engine.child


@pytest.mark.parametrize(
    ("script", "log", "told"),
    [
        ("say(type='failed', message='no model'); time.sleep(600)", None, "no model"),
        ("sys.exit(1)", None, "before it was ready"),
        ("print('[1]', flush=True); time.sleep(600)", None, "before it was ready"),
        ("say(type='ready'); time.sleep(600)", None, "before it was ready"),
        (
            "say(type='ready', port=5, pid=1); time.sleep(0.3); os.kill(os.getpid(), 11)",
            None,
            "-11",
        ),
        ("time.sleep(600)", None, "not ready after"),
        ("time.sleep(600)", "/proc/no/such/place.log", "could not be started"),
    ],
)
def test_an_engine_that_fails_is_reported_and_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, script: str, log: str | None, told: str
) -> None:
    monkeypatch.setattr(engines_module, "START_SECONDS", 1.0)
    statuses = []

    async def live() -> None:
        found = engines(bench, script)
        order = start_order(bench) if log is None else start_order(bench, log_path=log)
        found.obey(order)
        found.obey(order)
        (engine,) = found._engines.values()
        await until(lambda: not found.statuses())
        statuses.append(engine.status)
        if engine.child is not None:
            assert not list(members(engine.child.pid))
        await found.wire.close()

    asyncio.run(live())
    assert statuses[0].state == ("stopped" if "port=5" in script else "failed")
    assert told in (statuses[0].error or "")


def test_an_engine_is_stopped_in_every_moment_of_its_life(bench: Bench) -> None:
    """Before it is there, while it starts, when it serves, and when it does not listen."""
    ready = "say(type='ready', port=5, pid=1); time.sleep(600)"

    async def stopped_after(script: str, wait: Any) -> None:
        found = engines(bench, script)
        found.obey(start_order(bench))
        (engine,) = found._engines.values()
        await until(lambda: wait(engine))
        found.obey(EngineOrder(id="engine-1", action="stop"))
        await until(lambda: not found.statuses())
        assert engine.status.state == "stopped"
        if engine.child is not None:
            assert not list(members(engine.child.pid))
        await found.wire.close()

    asyncio.run(stopped_after(ready, lambda engine: True))
    asyncio.run(stopped_after("time.sleep(600)", lambda engine: engine.child))
    asyncio.run(stopped_after(ready, lambda engine: engine.status.state == "ready"))


def test_an_engine_that_dies_while_the_api_is_away_is_noticed(bench: Bench) -> None:
    async def live() -> None:
        found = engines(bench, "say(type='ready', port=5, pid=1); time.sleep(600)")
        bench.api.answer = 503, ""
        found.obey(start_order(bench))
        await until(lambda: found.statuses()[0].state == "ready")
        engine_child(found).kill()
        await until(lambda: found.statuses()[0].state == "stopped")
        bench.api.answer = None
        await until(lambda: not found.statuses())
        await found.wire.close()

    asyncio.run(live())


# the forking process


def test_a_forking_process_in_trouble_takes_nobody_along(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal or a long silence costs a cold start; what it had forked lives on."""
    monkeypatch.setattr(fork, "FORK_SECONDS", 1.0)
    (bench.folder / "unknown.py").write_text("import time; time.sleep(600)")

    async def live() -> None:
        forker = Forker(True, bench.folder / "zygote.log")
        forker.warm_up()
        await forker.wait_ready(120)
        assert forker.is_ready
        zygote = forker._zygote
        assert zygote is not None
        first = await forker.start("tunesmith.train", [])
        cold = await forker.start("unknown", [])
        assert is_alive(first.pid)
        assert psutil.Process(cold.pid).ppid() == os.getpid()
        os.kill(zygote._process.pid, signal.SIGSTOP)
        second = await forker.start("unknown", [])
        third = await forker.start("unknown", [])
        os.kill(zygote._process.pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert is_alive(first.pid)
        await first.hand_over(b"{}")
        assert await asyncio.wait_for(first.exited, 60) == 1
        await until(lambda: zygote.is_dead)
        for child in (first, cold, second, third):
            child.kill()
            child.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(third.exited, 30)
        forker.close()

    asyncio.run(live())


def test_a_forking_process_that_dies_in_its_first_breath_is_done_without(bench: Bench) -> None:
    (bench.folder / "unknown.py").write_text("print('here', flush=True)")

    async def live() -> None:
        forker = Forker(True, bench.folder / "zygote.log")
        forker.warm_up()
        assert forker._zygote is not None
        forker._zygote._process.kill()
        child = await forker.start("unknown", [])
        assert await child.stdout.readline() == b"here\n"
        assert await asyncio.wait_for(child.exited, 30) == 0
        child.close()
        forker.close()

    asyncio.run(live())


HEARD = """
os.makedirs(task["attempt_dir"] + "/parity")
finish(3)
"""


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("", "ended without a verdict"),
        ("import os; os.kill(os.getpid(), 9)", "ended without a verdict"),
        ("print('no json')", "ended without a verdict"),
        ('print(\'{"unheard": "no such layers"}\')', "no such layers"),
    ],
)
def test_a_gate_that_cannot_judge_lets_the_model_pass_with_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, gate: str, told: str
) -> None:
    (bench.folder / "scripted_gate.py").write_text(gate)
    monkeypatch.setattr(gate_module, "MODULE", "scripted_gate")
    assert bench.run(HEARD)["kind"] == "succeeded"
    notice = bench.api.events[-1][1]
    assert (notice["code"], notice["level"]) == ("not_compared", "warning")
    assert told in notice["message"]


def test_a_stop_at_the_gate_leaves_the_model_to_the_next_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = bench.folder / "begun"
    script = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    (bench.folder / "scripted_gate.py").write_text(script)
    monkeypatch.setattr(gate_module, "MODULE", "scripted_gate")

    async def stop_at_the_gate() -> None:
        attempt = bench.attempt(HEARD)
        running = asyncio.create_task(attempt.run())
        await until(begun.exists)
        attempt.stop(5)
        await asyncio.wait_for(running, 60)
        await attempt.wire.close()

    asyncio.run(stop_at_the_gate())
    outcome = bench.api.outcomes[-1]
    assert (outcome["kind"], outcome["step"]) == ("stopped", 3)

"""Two processes under torchrun train as one would, and end, stop and die as one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from house import open_house
from rl_fixtures import MATCH, guessing
from train_fixtures import (
    Events,
    Place,
    is_alive,
    make_model,
    pairs,
    preferences,
    read_events,
    run_here,
    sft,
    tuned,
    write_rows,
)
from tunesmith.spec.pipe import Inputs, Plan, TrainerTask
from tunesmith.spec.train import Grpo, Kto, Lora, Preference, Run

PAIR = Plan(threads=1, processes=2, micro_batch_tokens=96)
EACH_STEP = Run(save_steps=1, keep_checkpoints=20, save_seconds=3600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("parallel")
    model = make_model(folder / "model")
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(40)))


@dataclass
class Launched:
    process: "subprocess.Popen[bytes]"
    events_path: Path
    log: Path

    @property
    def events(self) -> Events:
        return read_events(self.events_path)

    def wait_for(self, kind: str, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.events.of(kind)) < count:
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def ranks(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


def launch(task: TrainerTask, *module: str) -> Launched:
    stem = Path(task.attempt_dir)
    stem.parent.mkdir(parents=True, exist_ok=True)
    given, events, log = (stem.with_suffix(s) for s in (".task", ".events", ".log"))
    given.write_text(task.model_dump_json(), encoding="utf-8")
    with given.open("rb") as stdin, events.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", *(module or ("tunesmith.train.launch", "--processes", "2"))],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return Launched(process, events, log)


@pytest.fixture
def started() -> Iterator[list[Launched]]:
    made: list[Launched] = []
    yield made
    for one in made:
        one.process.kill()
        one.process.wait()


def run(task: TrainerTask, *module: str) -> Events:
    launched = launch(task, *module)
    assert launched.process.wait(120) == 0, launched.log.read_text()
    return launched.events


def weights_of(events: Events) -> dict[str, torch.Tensor]:
    [path] = Path(events.last["artifact"]).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_two_processes_make_the_updates_of_one_with_twice_the_batch(
    place: Place, lora: Lora | None
) -> None:
    both = run(place.task(sft(lora, batch_size=4), plan=PAIR))
    alone = run(place.task(sft(lora, batch_size=8)), "tunesmith.train")
    assert both.of("started")[0]["plan"]["processes"] == 2
    assert both.losses.keys() == alone.losses.keys()
    for step, loss in alone.losses.items():
        assert both.losses[step] == pytest.approx(loss, rel=1e-5)
    weights = weights_of(alone)
    for name, tensor in weights_of(both).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Preference, Kto])
def test_two_processes_compare_answers_as_one_does(
    place: Place, kind: type[Preference] | type[Kto]
) -> None:
    rows = write_rows(place.folder / "pairs.jsonl", preferences(20))
    inputs = Inputs(model=str(place.model), dataset=str(rows))
    both = run(place.task(tuned(kind, batch_size=4, epochs=2), plan=PAIR, inputs=inputs))
    alone = run(place.task(tuned(kind, batch_size=8, epochs=2), inputs=inputs), "tunesmith.train")
    for ours, theirs in zip(both.of("step"), alone.of("step"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-4)


def test_two_processes_draw_and_learn_as_one_does(tmp_path: Path) -> None:
    place = guessing(tmp_path)
    common = {"rewards": MATCH, "max_completion_length": 6, "max_length": 32, "max_steps": 3}
    common |= {"num_generations": 4, "kl_target": 0.1, "update_epochs": 2}
    pair = tuned(Grpo, rollout_batch_size=4, batch_size=16, **common)
    one = tuned(Grpo, rollout_batch_size=8, batch_size=32, **common)
    alone, both = run_here(place.task(one)), run(place.task(pair, plan=PAIR))
    assert both.losses == pytest.approx(alone.losses, abs=1e-6)
    for step, expected in zip(both.of("step"), alone.of("step"), strict=True):
        assert step["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)


def test_two_processes_train_a_reward_model_first_as_one_does(place: Place) -> None:
    rows = write_rows(place.folder / "taught.jsonl", preferences(16))
    inputs = Inputs(model=str(place.model), dataset=str(rows))
    common = {"max_completion_length": 6, "max_length": 64, "max_steps": 2, "num_generations": 4}
    first, twice = ({"kind": "trained", "learning_rate": 1e-2, "batch_size": n} for n in (4, 8))
    pair = tuned(Grpo, rollout_batch_size=4, batch_size=16, rewards=[first], **common)
    one = tuned(Grpo, rollout_batch_size=8, batch_size=32, rewards=[twice], **common)
    alone, both = (
        run_here(place.task(one, inputs=inputs)),
        run(place.task(pair, plan=PAIR, inputs=inputs)),
    )
    assert both.losses == pytest.approx(alone.losses, abs=1e-5)
    rewards = [step["metrics"].get("reward/trained") for step in both.of("step")]
    assert rewards == pytest.approx(
        [step["metrics"].get("reward/trained") for step in alone.of("step")], abs=1e-4
    )


def test_a_stop_ends_both_with_a_checkpoint_from_which_the_same_bits_follow(
    place: Place, started: list[Launched]
) -> None:
    spec = sft(Lora(rank=4, dropout=0.3), batch_size=1, epochs=1, run=EACH_STEP)
    whole = run(place.task(spec, plan=PAIR))
    launched = launch(place.task(spec, plan=PAIR))
    started.append(launched)
    launched.wait_for("step", 3)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.process.wait(120) == 0, launched.log.read_text()
    assert launched.events.last["type"] == "stopped"
    newest = launched.events.of("checkpointed")[-1]["path"]
    rest = run(place.task(spec, plan=PAIR, resume_from=newest))
    assert launched.events.losses | rest.losses == whole.losses
    weights = weights_of(whole)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(rest).items())


def test_where_one_process_dies_the_other_does_not_wait_for_it(
    place: Place, started: list[Launched]
) -> None:
    spec = sft(batch_size=1, epochs=50)
    launched = launch(place.task(spec, plan=PAIR))
    started.append(launched)
    launched.wait_for("step", 2)
    ranks = launched.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launched.process.wait(120) == 1
    assert not any(is_alive(pid) for pid in ranks)
    assert not launched.events.of("finished")


def test_both_die_with_what_started_them(place: Place, started: list[Launched]) -> None:
    launched = launch(place.task(sft(batch_size=1, epochs=50), plan=PAIR))
    started.append(launched)
    launched.wait_for("step", 1)
    ranks = launched.ranks()
    launched.process.kill()
    launched.process.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fault_is_told_once_and_by_its_own_name(place: Place) -> None:
    task = place.task(sft(batch_size=1), plan=PAIR)
    broken = task.model_copy(
        update={"inputs": task.inputs.model_copy(update={"dataset": str(place.folder / "없다")})}
    )
    launched = launch(broken)
    assert launched.process.wait(120) == 1
    failures = launched.events.of("failed")
    assert failures
    assert {failure["failure_class"] for failure in failures} <= {"data_error", "user_error"}


def test_a_job_of_two_processes_runs_through_the_whole_house(tmp_path: Path) -> None:
    with open_house(tmp_path) as house:
        job_id = house.submit(devices=2, num_epochs=1, save_steps=2)
        job = house.wait_end(job_id)
        assert job["state"] == "succeeded", job
        started = house.wait_event(job_id, "started")["data"]
        assert started["plan"]["processes"] == 2
        assert started["total_steps"] == 8  # 64 rows, four on each of two processes

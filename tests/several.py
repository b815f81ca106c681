"""Tasks of one or several processes, forked from one that has everything imported.

    python tests/several.py < cases.json

A case is a task and, for each of its processes, how many bytes it may have beside its model; 0
sets no limit. Events go to <attempt_dir>.<rank>.events, logs to
<attempt_dir>.<rank>.log, one case after the other.
"""

import json
import os
import resource
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from train_fixtures import Events, read_events
from tunesmith.spec.pipe import Notice, Started, TrainerEvent, TrainerTask
from tunesmith.train import process
from tunesmith.train.report import Report


def run_several(cases: list[tuple[TrainerTask, list[int]]]) -> list[Events]:
    """What the first process of each said."""
    body = [{"task": task.model_dump(mode="json"), "rooms": rooms} for task, rooms in cases]
    subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(body).encode(),
        env={**os.environ, "PYTHONPATH": "src:tests"},
        timeout=300,
        check=True,
    )
    return [read_events(Path(task.attempt_dir).with_suffix(".0.events")) for task, _ in cases]


class Tight(Report):
    """The kernel refuses memory from the moment that a job has said its first word, which is that
    its model, then opened, has a shorter context than was asked for."""

    room = 0

    def send(self, event: TrainerEvent) -> None:
        super().send(event)
        if isinstance(event, Notice | Started) and self.room:
            words = Path("/proc/self/status").read_text().split()
            held = int(words[words.index("VmData:") + 1]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (held + self.room, held + self.room))
            self.room = 0


def main() -> None:
    process.quiet_environment()
    from tunesmith.train.zygote import preload

    preload()
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for case in json.load(sys.stdin):
        task = TrainerTask.model_validate(case["task"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ["WORLD_SIZE"] = str(len(case["rooms"]))
        children = [_start(task, rank, room) for rank, room in enumerate(case["rooms"])]
        for child in children:
            os.waitpid(child, 0)


def _start(task: TrainerTask, rank: int, room: int) -> int:
    child = os.fork()
    if child == 0:
        process.die_with_parent()
        os.environ["RANK"] = str(rank)
        log = open(Path(task.attempt_dir).with_suffix(f".{rank}.log"), "wb")  # noqa: SIM115
        os.dup2(log.fileno(), 2)
        try:
            _live(task, rank, room)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    return child


def _live(task: TrainerTask, rank: int, room: int) -> None:
    from tunesmith.train import parallel
    from tunesmith.train.failure import tell
    from tunesmith.train.sweep import job_for

    group = parallel.join()
    with Path(task.attempt_dir).with_suffix(f".{rank}.events").open("wb") as events:
        report = Tight(events.fileno(), is_heard=group.is_first)
        report.room = room
        try:
            job_for(task, report, process.Asks(), group).run()
        except Exception as error:
            traceback.print_exc()
            report.send(tell(error))
    parallel.leave()


if __name__ == "__main__":
    main()

"""A trainer of several processes: torchrun's agent, which looks like one trainer from outside.

    python -m tunesmith.train.launch --processes 2 < task.json

The task comes on stdin, events go to stdout, and signals are passed on to every process, as with
`python -m tunesmith.train`. On several nodes each runs it with the same --nodes and --endpoint;
node 0 has the task, and alone speaks.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tunesmith.train import process

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
GATHER_SECONDS = 300
"""For all nodes to come."""
LEAVE_SECONDS = 30
"""For the others, once one process has failed."""


def main(argv: list[str] | None = None) -> int:
    asked = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    process.quiet_environment()
    process.die_with_parent()
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    with _task_file(asked.node) as task:
        return _launch(asked, task)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tunesmith.train.launch")
    parser.add_argument("--processes", type=int, required=True, help="on this node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0, help="number of this one, from 0")
    parser.add_argument("--endpoint", default="127.0.0.1:0", help="host:port of node 0")
    parser.add_argument("--id", default="alone", help="the same on every node, and only there")
    return parser


@contextlib.contextmanager
def _task_file(node: int) -> Iterator[str]:
    """What came on stdin, as a file that rank 0 can read; it is gone when the training is over."""
    if node:
        yield "-"
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        place = Path(folder) / "task.json"
        place.write_bytes(sys.stdin.buffer.read())
        yield str(place)


def _launch(asked: argparse.Namespace, task: str) -> int:
    # Here, so that the environment is set before torch is loaded.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // asked.processes))
    config = LaunchConfig(
        min_nodes=asked.nodes,
        max_nodes=asked.nodes,
        nproc_per_node=asked.processes,
        run_id=asked.id,
        # Of several nodes each has its number: rank 0 must be where the task is.
        rdzv_backend="c10d" if asked.nodes == 1 else "static",
        rdzv_endpoint=asked.endpoint,
        rdzv_configs={"timeout": GATHER_SECONDS}
        | ({"is_host": True} if asked.nodes == 1 else {"rank": asked.node}),
        local_addr="127.0.0.1" if asked.nodes == 1 else None,
        max_restarts=0,
        signals_to_handle="SIGHUP",
        # Each process sees its GPU as the first; an empty list means that there is none.
        virtual_local_rank=os.environ.get("CUDA_VISIBLE_DEVICES") != "",
        shutdown_timeout=LEAVE_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tunesmith.train", "--task", task)
    except ChildFailedError as failed:
        print(f"a process of the trainer failed: {failed}", file=sys.stderr)
        return 1
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def _children() -> list[int]:
    own = Path("/proc/self/task")
    found = [place.read_text().split() for place in own.glob("*/children")]
    return [int(pid) for pids in found for pid in pids]


if __name__ == "__main__":
    sys.exit(main())

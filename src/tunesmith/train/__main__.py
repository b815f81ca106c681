"""The trainer: a task on stdin, events on stdout, the log on stderr, a signal to stop.

    python -m tunesmith.train < task.json

Under torchrun (`tunesmith.train.launch`) the task is a file, --task FILE; rank 0 reads it and
alone speaks, but for a failure.
Ends with 0 where the job finished or stopped as asked, with 1 where it failed.
"""

import contextlib
import os
import sys
import traceback

from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import TrainerTask
from tunesmith.train import process
from tunesmith.train.failure import tell
from tunesmith.train.report import Report

MAX_TASK_BYTES = 16 << 20


def main() -> int:
    process.quiet_environment()
    process.die_with_parent()
    process.give_way()
    asks = process.Asks()
    asks.listen()
    is_heard = os.environ.get("RANK", "0") == "0"
    report = Report(process.claim_stdout(), is_heard=is_heard)
    try:
        _carry_out(report, asks)
    except BrokenPipeError:
        return 1
    except Exception as error:
        traceback.print_exc()
        return _fail(report, error)
    return 0


def _carry_out(report: Report, asks: process.Asks) -> None:
    body = _task()
    if len(body) > MAX_TASK_BYTES:
        raise JobFailure(FailureClass.USER_ERROR, f"a task of over {MAX_TASK_BYTES:,} bytes")
    # Here, so that the environment is set before torch is loaded.
    from tunesmith.train import parallel
    from tunesmith.train.sweep import job_for

    group = parallel.join()
    try:
        task = TrainerTask.model_validate_json(group.tell(body))
        job_for(task, report, asks, group).run()
    finally:
        parallel.leave()


def _task() -> bytes:
    """Empty on the ranks that are told by rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return b""
    if "--task" in sys.argv:
        with open(sys.argv[sys.argv.index("--task") + 1], "rb") as file:
            return file.read(MAX_TASK_BYTES + 1)
    return sys.stdin.buffer.read(MAX_TASK_BYTES + 1)


def _fail(report: Report, error: Exception) -> int:
    with contextlib.suppress(BrokenPipeError):
        report.send(tell(error))
    return 1


if __name__ == "__main__":
    sys.exit(main())

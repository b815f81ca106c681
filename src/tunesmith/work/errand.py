"""What a task of a cluster does on its node: run a worker for one job, and end with it."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.settings import Settings
from tunesmith.work import keeper
from tunesmith.work.gang import MODULE, Gang

STOP_SECONDS = 36.0
"""For the trainer's last checkpoint, once the task is cancelled."""


@dataclass(frozen=True)
class Errand:
    """One job, and the API that has it. Goes to a node as plain values."""

    job_id: str
    workspace: str
    api_host: str
    """The name of the host of the API: there its own address is known."""
    server: str
    """The API's address for others; empty where it was not given."""
    token: str
    settings: tuple[tuple[str, str], ...]
    """TUNESMITH_ variables that are no secrets."""
    nodes: int = 1
    """That share the job."""
    endpoint: str = ""
    """Where they meet."""


def run(errand: Errand, gpus: Sequence[int]) -> str:
    """Claim the job with these GPUs of this node and train it. Returns what went wrong, or "".

    KeyboardInterrupt, as Ray cancels, stops the trainer after a checkpoint; then it is raised on.
    """
    is_home = errand.api_host == socket.gethostname() and _is_house(errand.workspace)
    if not is_home and not errand.server:
        return "the API's address for other hosts is not set: TUNESMITH_PUBLIC_URL"
    if errand.nodes > 1 and not _is_house(errand.workspace):
        return f"a job of several nodes needs the folder {errand.workspace} on every node"
    if not _is_house(errand.workspace):
        errand = replace(errand, workspace=str(_own_place()))
    environment = _environment(errand, gpus, is_home)
    settings = Settings.read(environment)
    worker = keeper.start(settings, "--only", errand.job_id, environment=environment)
    try:
        status = _wait(worker)
    finally:
        _end(worker)
    return f"its worker ended with status {status}" if status else ""


def join(errand: Errand, node: int, gpus: Sequence[int]) -> str:
    """On another node of the gang: as many processes of the trainer. Returns what went wrong."""
    gang = Gang(errand.nodes, errand.endpoint)
    arguments = gang.arguments(errand.job_id, max(1, len(gpus)) * errand.nodes, node)
    trainer = subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = _wait(trainer)
    finally:
        _end(trainer)
    return f"its processes ended with status {status}" if status else ""


def _is_house(workspace: str) -> bool:
    return (Path(workspace) / ".tunesmith" / "worker.token").exists()


def _own_place() -> Path:
    """For a node that does not see the API's workspace."""
    return Path.home() / ".cache" / "tunesmith" / "node"


def _environment(errand: Errand, gpus: Sequence[int], is_home: bool) -> dict[str, str]:
    """What differs from this process's own."""
    return dict(errand.settings) | {
        "TUNESMITH_WORKSPACE": errand.workspace,
        "TUNESMITH_BASE_URL": "" if is_home else errand.server,
        "TUNESMITH_WORKER_TOKEN": "" if is_home else errand.token,
        "TUNESMITH_CPU_SLOTS": "1",
        "TUNESMITH_GANG_NODES": str(errand.nodes),
        "TUNESMITH_GANG_ENDPOINT": errand.endpoint,
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
    }


def _wait(worker: "subprocess.Popen[bytes]") -> int:
    """In turns: an interrupt is seen between two of them only."""
    ended = os.pidfd_open(worker.pid)
    try:
        while not select.select([ended], [], [], 0.5)[0]:
            continue
    finally:
        os.close(ended)
    return worker.wait()


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """A kind word, then a hard one; a second interrupt does not cut it short."""
    if worker.poll() is not None:
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker.send_signal(signal.SIGTERM)
        worker.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    finally:
        signal.signal(signal.SIGINT, before)

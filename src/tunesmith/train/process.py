"""What a training process arranges with its surroundings: parent, descriptors, signals, threads."""

import ctypes
import faulthandler
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType

QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
"""Read by OpenMP, the tokenizers and transformers when they are loaded. Threads that wait by
spinning cost half of the machine where several jobs share it."""

_PR_SET_PDEATHSIG = 1
_NICENESS = 5


def quiet_environment() -> None:
    """Set `QUIET`; to be called before torch is imported. What is already set is left alone."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, and leave now if it already has.

    The parent is the thread that forked. Where the system has no such call, nothing happens: the
    next event then meets a broken pipe.
    """
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def give_way() -> None:
    """Lower this process's priority under that of the servers, once."""
    if os.getpriority(os.PRIO_PROCESS, 0) < _NICENESS:
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)


def claim_stdout() -> int:
    """Keep stdout for events on a new descriptor, and send what libraries print to stderr."""
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return descriptor


@dataclass
class Asks:
    """What signals have asked for since last looked at."""

    should_stop: bool = False
    should_checkpoint: bool = False

    def listen(self) -> None:
        """SIGTERM and SIGINT: stop; SIGUSR2: a checkpoint; SIGUSR1: stacks to stderr."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR2, self._checkpoint)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.should_stop = True

    def _checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.should_checkpoint = True

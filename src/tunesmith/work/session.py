"""A trainer's process session: every process in it, and how it is brought to an end."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after a fork it would be too late


def members(session: int) -> Iterator[int]:
    """The ids of all living processes of a session, whatever their group or parent."""
    for name in os.listdir("/proc"):
        if name.isdigit() and _session_of(name) == session:
            yield int(name)


def _session_of(name: str) -> int | None:
    """Of a living process. Its own name in there is any bytes, brackets and spaces too."""
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[3]) if len(fields) > 3 and fields[0] not in (b"Z", b"X") else None


def signal_session(session: int, number: signal.Signals) -> int:
    """Send a signal to every process of a session. Returns how many were there."""
    return len(_signal_all(members(session), number))


def kill_session(session: int) -> None:
    """Kill until nobody new turns up: a process may fork while it is being killed.

    What was killed may need a while to go, with the memory it frees: that is not waited for.
    """
    killed: set[int] = set()
    while new := set(members(session)) - killed:
        killed |= _signal_all(new, signal.SIGKILL) | new


def _signal_all(pids: "Iterator[int] | set[int]", number: signal.Signals) -> set[int]:
    reached = set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            reached.add(pid)
    return reached


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the thread that started this process ends (Linux)."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)

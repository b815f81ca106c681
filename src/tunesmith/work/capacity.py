"""What this host has and what of it is free: slots for CPU jobs, GPUs, memory."""

import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.spec.hands import Assignment, Capacity, HeldAttempt


@dataclass
class Host:
    slots: int
    memory_reserve_bytes: int
    gpus: tuple[int, ...]
    held: dict[HeldAttempt, Assignment] = field(default_factory=dict)

    def capacity(self) -> Capacity:
        """Free memory is what the kernel calls available, less the reserve."""
        total, available = memory()
        taken = {gpu for job in self.held.values() for gpu in job.gpus}
        busy = sum(not job.gpus for job in self.held.values())
        return Capacity(
            slots=max(0, self.slots - busy),
            gpus=tuple(gpu for gpu in self.gpus if gpu not in taken),
            memory_bytes=max(0, available - self.memory_reserve_bytes),
            max_slots=self.slots,
            max_gpus=len(self.gpus),
            max_memory_bytes=max(0, total - self.memory_reserve_bytes),
        )


def memory() -> tuple[int, int]:
    """Host memory in bytes: all of it, and what is available now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["MemTotal"], sizes["MemAvailable"]


def visible_gpus(chosen: str | None) -> tuple[int, ...]:
    """Indexes of the NVIDIA GPUs that jobs may use: those chosen, or all that the driver knows."""
    if chosen is not None:
        return tuple(int(part) for part in chosen.split(",") if part.strip().isdigit())
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listing = subprocess.run(
            [program, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) for line in listing.split() if line.isdigit())


def host_name() -> str:
    return socket.gethostname() or "localhost"

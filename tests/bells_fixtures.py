"""Houses whose workers are woken by Celery, and faults of the broker between them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from house import PATIENCE, QUICK, House, build
from servers import Redis
from tunesmith.work.rings import Ringer

ENDS = ("succeeded", "failed", "cancelled")


@dataclass
class Bells:
    """A house with `api --bell celery`, its broker, and Celery workers on this host."""

    house: House
    redis: Redis
    celeries: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start_celery(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """The command that the README tells, with `-c 1` unless something else is given."""
        command = ["-m", "celery", "-A", "tunesmith.work.celery", "worker"]
        kept = {name: value for name, value in os.environ.items() if "TUNESMITH_" not in name}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, "-l", "INFO", *(arguments or ("-c", "1"))],
                env=kept | QUICK | self.house.over | {"TUNESMITH_WORKSPACE": str(self.workspace)},
                stdout=log,
                stderr=log,
                cwd=self.workspace,
                start_new_session=True,
            )
        self.celeries.append(process)
        return process

    @property
    def workspace(self) -> Path:
        return self.house.workspace

    @property
    def log(self) -> Path:
        """The server's too, so that what is printed where a wait was in vain tells all."""
        return self.workspace / "server.log"

    def wait_ready(self, times: int = 1) -> None:
        """Until Celery has reached the broker so many times, over all its starts."""
        self.house.wait(lambda: self.ready_times() >= times)

    def ready_times(self) -> int:
        return len(re.findall(r"@\S+ ready\.", self.log.read_text()))

    def kill_celery(self) -> None:
        """kill -9 of the main processes, and of nothing else."""
        for process in self.celeries:
            process.kill()
            process.wait()
        self.celeries.clear()

    def forget_dead(self) -> None:
        self.celeries = [process for process in self.celeries if process.poll() is None]

    def stop_celery(self) -> None:
        """As Ctrl-C would."""
        for process in self.celeries:
            process.send_signal(signal.SIGTERM)
        for process in self.celeries:
            process.wait(PATIENCE)
        self.celeries.clear()

    def ring(self, times: int = 6) -> None:
        """The same message again, as a broker that repeats itself delivers it."""
        ringer = Ringer(self.redis.url)
        for _ in range(times):
            with contextlib.suppress(Exception):  # the broker may be down
                ringer.ring()

    def end(self) -> None:
        self.kill_celery()
        self.house.end()
        self.house.wait(lambda: not self.house.children())


@contextlib.contextmanager
def open_bells(workspace: Path, redis: Redis, **over: str) -> Iterator[Bells]:
    """Without a Celery worker yet."""
    over = {"TUNESMITH_REDIS_URL": redis.url, "TUNESMITH_POLL_SECONDS": "2"} | over
    bells = Bells(build(workspace, **over), redis)
    try:
        bells.house.start("api", "--bell", "celery")
        yield bells
    finally:
        bells.end()


def break_broker(
    bells: Bells, jobs: int = 30, flushes: int = 5, kills: int = 2, celery_kills: int = 1
) -> dict[str, int]:
    """Submit `jobs` tiny jobs while the broker is emptied and killed, Celery workers are killed,
    and each message comes six times. Returns counts; the caller judges them.

    `lost`: no end in time. `doubled`: more attempts than one, and than kills can account for.
    """
    house = bells.house
    faults = ["flush"] * flushes + ["broker"] * kills + ["celery"] * celery_kills
    every = max(1, jobs // (len(faults) + 1))
    refused, names = 0, []
    for number in range(jobs):
        try:
            names.append(house.submit(max_steps=1))
        except AssertionError:
            refused += 1
        bells.ring()
        if number % every == every - 1 and faults:
            _do(bells, faults.pop(0))
    for fault in faults:
        _do(bells, fault)
    ended = _wait_all(house, names)
    events = house.query("select job_id, type from events where type in ('claimed', 'succeeded')")
    claims = [name for name, kind in events if kind == "claimed"]
    ends = [name for name, kind in events if kind == "succeeded"]
    return {
        "jobs": jobs,
        "refused": refused,
        "lost": len(names) - len(ended),
        "failed": sum(job["state"] != "succeeded" for job in ended),
        "ends": len(ends),
        "doubled_ends": len(ends) - len(set(ends)),
        "extra_attempts": len(claims) - len(set(claims)),
        "flushes": flushes,
        "broker_kills": kills,
        "celery_kills": celery_kills,
    }


def _do(bells: Bells, fault: str) -> None:
    if fault == "flush":
        bells.redis.flush()
    elif fault == "broker":
        bells.redis.stop()
        time.sleep(0.5)
        bells.redis.start()
    else:
        bells.kill_celery()
        bells.start_celery()


def _wait_all(house: House, names: list[str]) -> list[dict[str, Any]]:
    """The jobs that ended in time."""
    deadline = time.monotonic() + PATIENCE
    ended: dict[str, dict[str, Any]] = {}
    while len(ended) < len(names) and time.monotonic() < deadline:
        for name in names:
            if name not in ended and (job := house.job(name))["state"] in ENDS:
                ended[name] = job
        time.sleep(0.2)
    return list(ended.values())


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

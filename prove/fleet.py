"""A house and more worker hosts, each with a home of its own, whose parts may be killed at will."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from house import KEY, PATIENCE, QUICK, House, build
from prove.processes import Process, living, wait_until_gone
from servers import Postgres, free_port, open_postgres

LEASE_SECONDS = 2.0
PACE = {
    "TUNESMITH_LEASE_SECONDS": str(LEASE_SECONDS),
    "TUNESMITH_HEARTBEAT_SECONDS": "0.4",
    "TUNESMITH_REAPER_SECONDS": "0.3",
    "TUNESMITH_GRACE_SECONDS": "5",
    "TUNESMITH_MAX_LAPSES": "1000",
    "TUNESMITH_BACKOFF_SECONDS": "0.1",
    "TUNESMITH_CPU_SLOTS": "2",
    "TUNESMITH_LOG_LEVEL": "WARNING",
}
"""Short leases; a storm may take any number of attempts from a job."""


@dataclass
class Host:
    """A worker beside the house's own: it knows the API's address and token, no more."""

    workspace: Path
    server: str
    token: str
    over: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("TUNESMITH")}
        mine = {
            "TUNESMITH_WORKSPACE": str(self.workspace),
            "TUNESMITH_WORKER_TOKEN": self.token,
        }
        with (self.workspace / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.cli", "worker", "--server", self.server],
                env=kept | QUICK | self.over | mine,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.workspace,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None


@dataclass
class Fleet:
    house: House
    hosts: list[Host]
    cluster: Postgres | None = None
    """Where the house stands on PostgreSQL."""
    second: House | None = None
    """Another API of the same house, which PostgreSQL allows."""

    @property
    def workspaces(self) -> tuple[Path, ...]:
        return (self.house.workspace, *(host.workspace for host in self.hosts))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.house.port}"

    @property
    def apis(self) -> list[House]:
        return [self.house] if self.second is None else [self.house, self.second]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{api.port}" for api in self.apis]

    def living(self, *roles: str) -> list[Process]:
        found = living(*self.workspaces)
        return [one for one in found if not roles or one.role in roles]

    def revive(self) -> None:
        """Start what has ended: the APIs, and the hosts beside them. The house's own worker is the
        first API's affair."""
        if _has_ended(self.house):
            self.house.start()
        if self.second is not None and _has_ended(self.second):
            self.second.start("api", "--no-worker")
        for host in self.hosts:
            if host.has_ended:
                host.start()

    def stop(self) -> list[Process]:
        """As an operator would. Returns what is left then, which is killed."""
        for host in self.hosts:
            if not host.has_ended and host.process is not None:
                host.process.terminate()
        for host in self.hosts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if host.process is not None:
                    host.process.wait(PATIENCE)
        for api in reversed(self.apis):
            api.stop()
        left = self.living()
        self.kill()
        return left

    def kill(self) -> None:
        found = self.living()
        for process in found:
            os.kill(process.pid, 9) if process.is_alive else None
        for popen in (one.process for one in (*self.apis, *self.hosts)):
            if popen is not None and popen.poll() is None:
                popen.kill()
                popen.wait()
        wait_until_gone({process.pid for process in found}, PATIENCE)


def _has_ended(api: House) -> bool:
    return api.process is None or api.process.poll() is not None


@contextlib.contextmanager
def open_fleet(
    folder: Path,
    database: str,
    hosts: int = 2,
    arguments: tuple[str, ...] = (),
    apis: int = 1,
    **over: str,
) -> Iterator[Fleet]:
    """A house on `sqlite` or `postgresql` in `folder`, with so many hosts beside it; on PostgreSQL
    it may have two APIs, and the hosts take turns at them."""
    with _database(folder, database) as cluster:
        url = {"TUNESMITH_DATABASE_URL": cluster.database()} if cluster else {}
        pace = PACE | over | url
        place = folder.resolve() / "house"
        place.mkdir()
        house = build(place, **pace)
        house.port = free_port()
        house.start(*arguments)
        token = (house.home / "worker.token").read_text().strip()
        fleet = Fleet(house, [], cluster)
        if apis > 1 and cluster is not None:
            fleet.second = House(place, pace, port=free_port())
        try:
            for number in range(hosts):
                home = folder.resolve() / f"host-{number + 1}"
                home.mkdir()
                url = fleet.urls[number % len(fleet.urls)]
                fleet.hosts.append(Host(home, url, token, pace))
            fleet.revive()
            yield fleet
        finally:
            fleet.kill()


@contextlib.contextmanager
def _database(folder: Path, kind: str) -> Iterator[Postgres | None]:
    if kind == "sqlite":
        yield None
        return
    with open_postgres(folder / "postgres") as cluster:
        yield cluster


class Client:
    """Asks the APIs in turn until one answers: it may be down, frozen, or on its way up."""

    def __init__(self, *urls: str) -> None:
        self._http = httpx2.Client(timeout=15, headers=KEY, trust_env=False)
        self._urls = itertools.cycle(urls)
        self.server_errors: list[str] = []
        """Answers with 500: never right, whatever was killed."""

    def post(self, path: str, body: Any = None, key: str | None = None) -> httpx2.Response:
        """Raises TimeoutError where no answer came for a long time."""
        headers = {"Idempotency-Key": key} if key else {}
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.HTTPError):
                reply = self._http.post(next(self._urls) + path, json=body, headers=headers)
                if reply.status_code == 500:
                    self._note(f"POST {path}: {reply.text[:300]}")
                if reply.status_code < 500 and reply.status_code != 429:
                    return reply
            time.sleep(0.1)
        raise TimeoutError(f"POST {path} was not answered")

    def _note(self, fault: str) -> None:
        self.server_errors.append(fault)
        if len(self.server_errors) > 20:
            raise RuntimeError(f"the API fails again and again: {fault}")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Ledger:
    """What the API has promised to a client."""

    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The bodies, by job."""
    cancelled: set[str] = field(default_factory=set)
    """A cancel was acknowledged."""
    refused: set[str] = field(default_factory=set)
    """A cancel was refused since the job had ended."""
    heard: set[str] = field(default_factory=set)
    """Ids of webhook messages that came."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, client: Client, key: str, body: dict[str, Any]) -> str:
        """Under a key, since the answer may be lost with the API."""
        whole = {"model_name": "models/tiny", "dataset_path": "data/chat.jsonl", **body}
        reply = client.post("/train/sft", whole, key)
        assert reply.status_code == 200, reply.text
        job_id = str(reply.json()["job_id"])
        with self._lock:
            self.accepted[job_id] = whole
        return job_id

    def cancel(self, client: Client, job_id: str, is_forced: bool = False) -> bool:
        """Whether it was acknowledged."""
        reply = client.post(f"/jobs/{job_id}/cancel" + ("?force=true" if is_forced else ""))
        assert reply.status_code in (200, 409), reply.text
        with self._lock:
            (self.cancelled if reply.status_code == 200 else self.refused).add(job_id)
        return reply.status_code == 200


def clear(folder: Path) -> None:
    """Take away what a proof that went well left behind."""
    shutil.rmtree(folder, ignore_errors=True)

"""A whole house for journeys: a workspace, tiny real models, a real server, worker, trainers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import psutil
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from train_fixtures import WORDS, make_model, write_rows

KEY = {"Authorization": "Bearer test-key-001"}
PATIENCE = 120.0
"""Seconds until a wait counts as failed: machines are slow, the product is not asserted on it."""
QUICK = {
    "TUNESMITH_LEASE_SECONDS": "4",
    "TUNESMITH_HEARTBEAT_SECONDS": "0.5",
    "TUNESMITH_REAPER_SECONDS": "0.5",
    "TUNESMITH_MEMORY_RESERVE_BYTES": "0",
    "TUNESMITH_SHOULD_ASK_HUB": "0",
}


@dataclass
class House:
    workspace: Path
    over: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    url: str = ""
    port: int = 0
    """0: a free one at each start."""

    def start(self, *arguments: str) -> "House":
        """`tunesmith up`, or what else is given, and wait for its address."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")
        }
        environment |= QUICK | self.over | {"TUNESMITH_WORKSPACE": str(self.workspace)}
        with (self.workspace / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tunesmith.cli",
                    *(arguments or ["up"]),
                    "--port",
                    str(self.port),
                ],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self.workspace,
                start_new_session=True,
            )
        self.url = self._address()
        return self

    def stop(self) -> None:
        """As Ctrl-C would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(PATIENCE)

    def kill(self, *processes: psutil.Process) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self) -> None:
        """Whatever is left of it."""
        self.stop()
        self.kill(*self.children())

    @property
    def home(self) -> Path:
        return self.workspace / ".tunesmith"

    @property
    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    def children(self, module: str = "tunesmith") -> list[psutil.Process]:
        """Living processes of this workspace: worker, forking process, trainers, engines."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                mine = process.environ().get("TUNESMITH_WORKSPACE") == str(self.workspace)
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if mine and is_alive and module in line and process.pid != self._pid:
                    found.append(process)
        return found

    def worker(self) -> psutil.Process:
        return self.wait(lambda: next(iter(self.children("tunesmith.work.worker")), None))

    def trainer(self, job_id: str) -> psutil.Process:
        """The job's trainer, once it is there: its pid is in its `started` event."""
        started = self.wait_event(job_id, "started", last=True)
        return psutil.Process(started["data"]["pid"])

    @property
    def _pid(self) -> int:
        return self.process.pid if self.process else 0

    # what a client does

    def submit(self, kind: str = "sft", **fields: Any) -> str:
        """`kind`: sft or dpo."""
        dataset = {"sft": "data/chat.jsonl", "dpo": "data/pairs.jsonl"}[kind]
        body = {"model_name": "models/tiny", "dataset_path": dataset, **fields}
        with self.client as client:
            reply = client.post(f"/train/{kind}", json=body)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["job_id"])

    def configure(self, text: str, kind: str = "yaml") -> str:
        """Start a configuration's file."""
        headers = {"Content-Type": f"application/{kind}"}
        with self.client as client:
            reply = client.post("/train/config", content=text.encode(), headers=headers)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["job_id"])

    def job(self, job_id: str) -> dict[str, Any]:
        with self.client as client:
            return dict(client.get(f"/jobs/{job_id}").json())

    def wait_end(self, job_id: str) -> dict[str, Any]:
        ended = ("completed", "failed", "cancelled")

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            is_over = job["status"] in ended and job["state"] in (
                "succeeded",
                "failed",
                "cancelled",
            )
            return job if is_over else None

        return self.wait(look)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All that were written so far."""
        found = []
        with self.client as client, client.stream("GET", f"/jobs/{job_id}/events") as reply:
            last = self.last_seq(job_id)
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    found.append(json.loads(line[6:]))
                    if found[-1]["seq"] >= last:
                        return found
        return found

    def last_seq(self, job_id: str) -> int:
        """Read from the rows, on either database."""
        rows = self.query("select last_seq from jobs where id = :job_id", job_id=job_id)
        return int(rows[0][0])

    def query(self, statement: str, **values: Any) -> list[Any]:
        """Ask the house's database, beside its server: `:name` stands for a value."""
        with self._database.connect() as connection:
            return list(connection.execute(text(statement), values))

    @cached_property
    def _database(self) -> Engine:
        url = self.over.get("TUNESMITH_DATABASE_URL") or f"sqlite:///{self.home / 'db.sqlite'}"
        return create_engine(url, poolclass=NullPool)

    def wait_event(self, job_id: str, kind: str, last: bool = False, **data: Any) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = [
                event
                for event in self.events(job_id)
                if event["type"] == kind and data.items() <= event["data"].items()
            ]
            return found[-1 if last else 0] if found else None

        return self.wait(look)

    def wait(self, look: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.HTTPError):
                found = look()
                if found:
                    return found
            time.sleep(0.1)
        log = self.workspace / "server.log"
        raise AssertionError("waited in vain; the server said:\n" + log.read_text()[-4000:])

    def _address(self) -> str:
        place = self.home / "api.json"

        def look() -> str | None:
            assert self.process is not None
            assert self.process.poll() is None, (self.workspace / "server.log").read_text()
            told = json.loads(place.read_text()) if place.exists() else {"pid": 0}
            return str(told["url"]) if told["pid"] == self._pid else None

        return str(self.wait(look))


def build(workspace: Path, **over: str) -> House:
    """A workspace with a tiny chat model and conversations in three scripts."""
    make_model(workspace / "models" / "tiny")
    (workspace / "data").mkdir()
    write_rows(workspace / "data" / "chat.jsonl", chats(64))
    write_rows(workspace / "data" / "pairs.jsonl", preferences(64))
    return House(workspace, over)


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[i % len(WORDS)]} {i}"},
                {"role": "assistant", "content": WORDS[(i * 3) % len(WORDS)]},
            ]
        }
        for i in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{WORDS[i % len(WORDS)]} {i}",
            "chosen": WORDS[(i * 3) % len(WORDS)],
            "rejected": WORDS[(i * 3 + 1) % len(WORDS)],
        }
        for i in range(count)
    ]


@contextlib.contextmanager
def open_house(workspace: Path, arguments: Sequence[str] = (), **over: str) -> Iterator[House]:
    house = build(workspace, **over)
    try:
        yield house.start(*arguments)
    finally:
        house.end()

"""What the worker's tests stand on: a scripted trainer, and a small API that can be away."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tunesmith.spec.hands import Assignment
from tunesmith.spec.pipe import Inputs
from tunesmith.work.attempt import Attempt, Pace
from tunesmith.work.fork import Forker
from tunesmith.work.wire import Wire

SPEC = {"method": "sft", "model": "m", "dataset": "d"}
HEAD = """
import json, os, signal, subprocess, sys, time
task = json.loads(sys.stdin.read())

def say(**event):
    print(json.dumps(event), flush=True)

def step(n, **more):
    say(**{"type": "step", "step": n, "total_steps": 9, "epoch": 0.1, "loss": 1.0,
        "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 1, "label_tokens": 1,
        "tokens_per_second": 1.0, "peak_memory_bytes": 1, **more})

def finish(n=1):
    say(type="finished", step=n, artifact="/a", manifest_sha256="0" * 64)
"""


@dataclass
class Api:
    """Takes reports as the real one does: in order, each number once."""

    folder: Path
    reports: int = 0
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    orders: dict[str, Any] = field(default_factory=dict)
    answer: tuple[int, str] | None = None
    """Said to everything, where it is set."""
    finish_waits: threading.Event = field(default_factory=threading.Event)
    is_open: bool = True

    def take(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        if self.answer is not None:
            return self.answer
        if "/engines/" in path:
            return 200, ""
        if path.endswith("/finish"):
            self.finish_waits.wait(30)
            self.outcomes.append(body)
        elif path.endswith("/report"):
            self.reports += 1
            for event in body["events"]:
                if event["n"] == self.last_n + 1:
                    self.events.append((event["n"], event["event"]))
        orders = {"lease_seconds": 60, "accepted_n": self.last_n, **self.orders}
        return 200, json.dumps(orders)

    @property
    def last_n(self) -> int:
        return self.events[-1][0] if self.events else 0

    def write_address(self, url: str, **more: Any) -> None:
        note = {"url": url, "pid": os.getpid(), **more}
        (self.folder / "api.json").write_text(json.dumps(note))


@contextlib.contextmanager
def an_api(folder: Path) -> Iterator[Api]:
    api = Api(folder)
    api.finish_waits.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, text = api.take(self.path, json.loads(body))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    (folder / "worker.token").write_text("sk-worker")
    api.write_address(f"http://127.0.0.1:{server.server_port}")
    try:
        yield api
    finally:
        api.finish_waits.set()
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Bench:
    """One attempt of a scripted trainer under the worker's own supervision."""

    folder: Path
    api: Api
    leave_seconds: float = 30
    stall_seconds: float = 60
    max_log_bytes: int = 1 << 20
    heartbeat_seconds: float = 0.2

    def attempt(self, script: str, fence: int = 1, **over: Any) -> Attempt:
        module = f"scripted_{fence}"
        (self.folder / f"{module}.py").write_text(HEAD + script)
        job = {
            "job_id": "0badcafe",
            "fence": fence,
            "token": "at-token",
            "spec": SPEC,
            "inputs": Inputs(model="/m", dataset="/d"),
            "attempt_dir": str(self.folder / "attempts" / str(fence)),
            "log_path": str(self.log),
            "plan": None,
            "threads": 1,
            "lease_seconds": 60,
            "stall_seconds": self.stall_seconds,
            **over,
        }
        pace = Pace(self.heartbeat_seconds, self.max_log_bytes, self.leave_seconds)
        wire = Wire(self.folder)
        forker = Forker(False, self.folder / "zygote.log")
        return Attempt(Assignment.model_validate(job), "w", wire, forker, pace, module)

    def run(self, script: str, **over: Any) -> dict[str, Any]:
        """The outcome that the API was told."""
        asyncio.run(self._run(self.attempt(script, **over)))
        return self.api.outcomes[-1]

    async def _run(self, attempt: Attempt) -> None:
        await asyncio.wait_for(attempt.run(), 60)
        await attempt.wire.close()

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "job.log"


async def until(look: Any, seconds: float = 30) -> None:
    """Wait until `look()` is true."""
    for _ in range(int(seconds / 0.02)):
        if look():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("waited in vain")


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] != b"Z"

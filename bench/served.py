"""A server of its own for a benchmark: `tunesmith api --no-worker` on a free port."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipe import QUIET
from tunesmith.data import samples as documents
from workload import write_models

TESTS = Path(__file__).resolve().parents[1] / "tests"
READY_SECONDS = 60.0


@dataclass
class Server:
    workspace: Path
    over: dict[str, str] = field(default_factory=dict)
    """More of the environment."""
    process: "subprocess.Popen[bytes] | None" = None
    url: str = ""

    def start(self) -> float:
        """Start it; seconds from the process's start until it says that it is ready."""
        place = self.workspace / ".tunesmith" / "api.json"
        place.unlink(missing_ok=True)
        began = time.perf_counter()
        with (self.workspace / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.cli", "api", "--no-worker", "--port", "0"],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not self._is_ready(place):
            if self.process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
                raise RuntimeError((self.workspace / "server.log").read_text()[-3000:])
            time.sleep(0.01)
        return time.perf_counter() - began

    @property
    def environment(self) -> dict[str, str]:
        own = {"TUNESMITH_WORKSPACE": str(self.workspace), "TUNESMITH_MAX_QUEUED_JOBS": "1000000"}
        return os.environ | QUIET | own | self.over

    def _is_ready(self, place: Path) -> bool:
        if not place.exists():
            return False
        self.url = json.loads(place.read_text())["url"]
        try:
            with urllib.request.urlopen(f"{self.url}/health/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def cpu(self) -> float:
        """CPU seconds of the process so far."""
        assert self.process
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    def memory(self) -> float:
        """Resident megabytes."""
        assert self.process
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def kill(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()


def prepare(workspace: Path) -> None:
    """A model of ten million parameters with a tokenizer, and a small data set."""
    model = write_models(workspace / "models")["llama"]
    text = documents.documentation_text(200_000, 0)
    documents.write_tokenizer(documents.train_tokenizer(text, 1000), Path(model))
    (workspace / "data").mkdir()
    rows = [{"prompt": f"Say {number}.", "completion": f" {number}"} for number in range(100)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workspace / "data" / "rows.jsonl").write_text(lines)


@contextlib.contextmanager
def database(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a server on SQLite, or on a private PostgreSQL as the tests start it."""
    if kind == "sqlite":
        yield {}
        return
    sys.path.insert(0, str(TESTS))
    from servers import open_postgres

    with open_postgres(folder / "postgres", "synchronous_commit=on", "fsync=on") as cluster:
        yield {"TUNESMITH_DATABASE_URL": cluster.database()}

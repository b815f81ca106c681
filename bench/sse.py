"""A job's events to a thousand readers at once, some of whom leave and come back, some frozen.

    python bench/sse.py [--database sqlite|postgres|both] [--readers N] [--json PATH]

The server is `tunesmith api --no-worker`; the bench is the worker and reports one event a time.
Readers are raw sockets in a process of their own. An event's wait is counted from the time in its
row, which is before its commit, until its reader has it: so the commit's sync is in it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from served import TESTS, Server, database, prepare
from table import judge, print_table, write_json

sys.path.insert(0, str(TESTS))
from hand import Hand

EVENTS = 30
BARS = {
    "p99, ms": ("<=", 500.0),
    "lost, doubled, disordered": ("<=", 0),
    "API, MB": ("<=", 200.0),
    "50 frozen readers cost, MB": ("<", 10.0),
    "p99 beside frozen readers, ms": ("<=", 500.0),
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--database", default="both", choices=["sqlite", "postgres", "both"])
    arguments.add_argument("--readers", type=int, default=1000)
    arguments.add_argument("--returning", type=int, default=300)
    arguments.add_argument("--pause", type=float, default=0.1, help="seconds between two events")
    arguments.add_argument("--json", type=Path, default=Path("bench/out/sse.json"))
    chosen = arguments.parse_args()
    kinds = ["sqlite", "postgres"] if chosen.database == "both" else [chosen.database]
    figures: dict[str, float] = {}
    for kind in kinds:
        figures |= {f"{kind}: {name}": value for name, value in measure(kind, chosen).items()}
    print_table(["figure", "value"], list(figures.items()))
    bars = {f"{kind}: {name}": bar for kind in kinds for name, bar in BARS.items()}
    write_json(chosen.json, {"figures": figures, "verdicts": judge(figures, bars)})
    return 0


def measure(kind: str, chosen: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        workspace = Path(folder) / "workspace"
        workspace.mkdir()
        prepare(workspace)
        with database(kind, Path(folder)) as over:
            server = Server(workspace, over)
            server.start()
            hand = Hand(workspace, server.url)
            try:
                return many(server, hand, chosen) | frozen(server, hand, chosen)
            finally:
                hand.close()
                server.stop()


def many(server: Server, hand: Hand, chosen: argparse.Namespace) -> dict[str, float]:
    """All readers on one job; its 30 events come while some of them leave and come back."""
    idle = server.memory()
    job_id = submit(server, hand)
    order = {"count": chosen.readers, "returning": chosen.returning, "leave_at": (8, EVENTS)}
    before = server.cpu()
    readers = Readers(server, job_id, **order)
    opened = server.cpu()
    with Peak(server) as peak:
        for number in range(EVENTS - 6):  # queued, validated, claimed, running, started, the end
            hand.say(step(number))
            time.sleep(chosen.pause)
        hand.end()
        found = readers.join()
    whole = chosen.readers * EVENTS
    waits = sorted(found["waits"])
    assert found["events"] == whole, (found["events"], whole)
    return {
        "events delivered": found["events"],
        "readers that came back": found["returned"],
        "lost, doubled, disordered": found["lost"] + found["doubled"] + found["disordered"],
        "p50, ms": ms(waits, 50),
        "p99, ms": ms(waits, 99),
        "most, ms": ms(waits, 100),
        "API idle, MB": round(idle, 1),
        "API, MB": round(peak.bytes / 1e6, 1),
        "opening a stream: CPU ms": round((opened - before) / chosen.readers * 1e3, 3),
        "an event to a reader: CPU µs": round(
            (server.cpu() - opened) / (chosen.readers * (EVENTS - 5)) * 1e6, 1
        ),
    }


def frozen(server: Server, hand: Hand, chosen: argparse.Namespace) -> dict[str, float]:
    """A job with 8 MB of history; 50 readers take none of it, 200 others follow its end."""
    job_id = submit(server, hand)
    large = "가" * 1300
    for _ in range(20):
        hand.say(*[note(large)] * 100)
    Readers(server, job_id, count=1).stop()  # what the first reader of this job costs is not theirs
    time.sleep(1)
    before = server.memory()
    stuck = Readers(server, job_id, count=50, is_frozen=True)
    with Peak(server) as peak:
        time.sleep(3)
    after = peak.bytes / 1e6
    readers = Readers(server, job_id, count=200, mark="2000")  # who saw its history before
    for number in range(20):
        hand.say(step(number))
        time.sleep(chosen.pause)
    hand.end()
    found = readers.join()
    stuck.stop()
    return {
        "50 frozen readers cost, MB": round(after - before, 1),
        "p99 beside frozen readers, ms": ms(sorted(found["waits"]), 99),
    }


def submit(server: Server, hand: Hand) -> str:
    body = {"model_name": "models/llama", "dataset_path": "data/rows.jsonl", "num_epochs": 1}
    with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        reply = client.post("/train/sft", json=body)
    assert reply.status_code == 200, reply.text
    job_id = hand.claim()
    assert job_id == reply.json()["job_id"]
    return job_id


def step(number: int) -> dict[str, Any]:
    return {
        "type": "step",
        "step": number,
        "total_steps": 1000,
        "epoch": number / 100,
        "loss": 2.5,
        "learning_rate": 2e-5,
        "grad_norm": 1.25,
        "tokens": 4096,
        "label_tokens": 1024,
        "tokens_per_second": 2318.5,
        "peak_memory_bytes": 1 << 30,
    }


def note(text: str) -> dict[str, Any]:
    return {"type": "notice", "code": "note", "message": text}


def ms(waits: list[float], percent: int) -> float:
    place = min(len(waits) - 1, len(waits) * percent // 100)
    return round(waits[place] * 1e3, 1)


class Readers:
    """A process of readers; made once all their streams are open."""

    def __init__(self, server: Server, job_id: str, **order: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("readers.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        body = {"url": server.url, "job_id": job_id, **order}
        print(json.dumps(body), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "open\n"

    def join(self) -> dict[str, Any]:
        assert self._process.stdout
        found = json.loads(self._process.stdout.read())
        self._process.wait()
        return dict(found)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Peak:
    """The most memory that the server was seen to hold."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.bytes = 0.0

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.bytes = max(self.bytes, self._server.memory() * 1e6)


if __name__ == "__main__":
    sys.exit(main())

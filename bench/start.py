"""From submit to the first optimizer step, and from cancel to no process: CPU seconds and wall.

    python bench/start.py [--rounds N] [--json PATH]

The house's side is a real server with its worker and forking process; its CPU time is that of the
API, the worker, and the trainer up to the end of its first step. Each round submits a data set that
was never seen, so that every check is paid for. The other side is a process that imports TRL cold.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil

from pipe import QUIET
from table import judge, print_table, write_json
from tunesmith.data import samples as documents
from workload import LONGEST, RANK, SHORTEST, VOCABULARY, write_models

ROWS = 2000
BARS = {
    "house: CPU s to the first step": ("<=", 1.0),
    "cold TRL / house, CPU": (">=", 10.0),
    "cancel to no process, s": ("<=", 1.0),
    "API idle, MB": ("<", 120.0),
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--peer-rounds", type=int, default=2)
    arguments.add_argument("--json", type=Path, default=Path("bench/out/start.json"))
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        workspace = Path(folder)
        model = prepare(workspace, chosen.rounds + 1)
        with house(workspace) as (client, server):
            idle = server.memory_info().rss / 1e6
            starts = [start(client, server, round_) for round_ in range(chosen.rounds + 1)][1:]
            again = [start(client, server, chosen.rounds) for _ in range(2)]
            cancels = [cancel(client) for _ in range(chosen.rounds)]
        peers = [cold_trl(model, workspace) for _ in range(chosen.peer_rounds)]
    figures = summarise(starts, again, cancels, peers, idle)
    print_table(["figure", "median", "least", "most"], figures)
    verdicts = judge({row[0]: row[1] for row in figures}, BARS)
    write_json(chosen.json, {"figures": figures, "verdicts": verdicts, "starts": starts})
    return 0


def prepare(workspace: Path, count: int) -> str:
    """The ten-million-parameter Llama with a tokenizer of 4,096 entries, and data sets of 2,000
    rows of text that share no row."""
    model = write_models(workspace / "models")["llama"]
    words = " ".join(documents.documentation_text(1_500_000, 0)).split()
    tokenizer = documents.train_tokenizer([" ".join(words)], VOCABULARY)
    documents.write_tokenizer(tokenizer, Path(model))
    per_token = len(words) / len(tokenizer.encode(" ".join(words)).ids)
    (workspace / "data").mkdir()
    for number in range(count):
        lines = rows(words, per_token, random.Random(number))
        (workspace / "data" / f"{number}.jsonl").write_text("".join(lines))
    return model


def rows(
    words: list[str], per_token: float, dice: random.Random, longest: int = LONGEST
) -> Iterator[str]:
    """Prompt and completion, log-uniform in length from 20 to about `longest` tokens."""
    for _ in range(ROWS):
        length = math.exp(dice.uniform(math.log(SHORTEST), math.log(longest))) * per_token
        start, size = dice.randrange(len(words) - LONGEST), max(8, int(length * 0.95))
        text = words[start : start + size] or words[:size]
        cut = max(2, int(len(text) * dice.uniform(0.2, 0.5)))
        pair = {"prompt": " ".join(text[:cut]), "completion": " " + " ".join(text[cut:])}
        yield json.dumps(pair) + "\n"


@contextlib.contextmanager
def house(workspace: Path) -> Iterator[tuple[httpx2.Client, psutil.Process]]:
    """A server in a process of its own, warm: its forking process is ready."""
    environment = os.environ | QUIET | {"TUNESMITH_WORKSPACE": str(workspace)}
    with (workspace / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "up", "--port", "0"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    place = workspace / ".tunesmith" / "api.json"
    try:
        while not place.exists():
            time.sleep(0.1)
        url = json.loads(place.read_text())["url"]
        time.sleep(15)  # until the forking process has imported all
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def start(client: httpx2.Client, server: psutil.Process, number: int) -> dict[str, float]:
    """One job of one step: what it cost until that step was made."""
    worker = the_worker(server)
    api_before, worker_before = cpu(server), cpu(worker)
    began = time.perf_counter()
    job_id = submit(client, f"data/{number}.jsonl", max_steps=1)
    step = first(client, job_id, "step")
    wall = time.perf_counter() - began
    parts = {
        "api": cpu(server) - api_before,
        "worker": cpu(worker) - worker_before,
        "trainer": step["cpu_seconds"],
    }
    first(client, job_id, "succeeded")
    return parts | {"cpu": sum(parts.values()), "wall": wall}


def cancel(client: httpx2.Client) -> dict[str, float]:
    """Seconds from the cancel to the trainer's end, and of a step of that job."""
    job_id = submit(client, "data/0.jsonl", num_epochs=1000, batch_size=8)
    pid = first(client, job_id, "started")["pid"]
    first(client, job_id, "step")
    time.sleep(2)
    marks = [event for event in events(client, job_id) if event["type"] == "step"]
    speed = [event["data"]["tokens"] / event["data"]["tokens_per_second"] for event in marks]
    process = psutil.Process(pid)
    began = time.perf_counter()
    client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.002)
    took, step = time.perf_counter() - began, statistics.median(speed)
    return {"took": took, "step": step}


def submit(client: httpx2.Client, dataset: str, **fields: Any) -> str:
    body = {"model_name": "models/llama", "dataset_path": dataset, "max_length": 512}
    body |= {"batch_size": 2, "lora_r": RANK} | fields
    reply = client.post("/train/sft", json=body)
    reply.raise_for_status()
    return str(reply.json()["job_id"])


def first(client: httpx2.Client, job_id: str, kind: str) -> dict[str, Any]:
    """The data of the first event of a kind, waited for on the stream."""
    with client.stream("GET", f"/jobs/{job_id}/events") as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if event["type"] == kind:
                    return dict(event["data"])
    raise RuntimeError(f"job {job_id} ended without {kind}: {client.get(f'/jobs/{job_id}').text}")


def events(client: httpx2.Client, job_id: str) -> list[dict[str, Any]]:
    """What there is by now: the stream is left when it falls silent for half a second."""
    found = []
    timeout = httpx2.Timeout(5, read=0.4)
    with (
        contextlib.suppress(httpx2.ReadTimeout),
        client.stream("GET", f"/jobs/{job_id}/events", timeout=timeout) as reply,
    ):
        for line in reply.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
                if len(found) > 30:
                    break
    return found


def cold_trl(model: str, workspace: Path) -> dict[str, float]:
    """The same step in a fresh process with TRL, its own CPU clock read after the step."""
    script = Path(__file__).with_name("start_trl.py")
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, str(script), model, str(workspace / "data" / "0.jsonl")],
        env=os.environ | QUIET | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)},
        capture_output=True,
        text=True,
        check=True,
    )
    spent = float(run.stdout.strip().splitlines()[-1])
    return {"cpu": spent, "wall": time.perf_counter() - began}


def summarise(
    starts: list[dict[str, float]],
    again: list[dict[str, float]],
    cancels: list[dict[str, float]],
    peers: list[dict[str, float]],
    idle: float,
) -> list[list[Any]]:
    ours = [one["cpu"] for one in starts]
    theirs = [one["cpu"] for one in peers]
    rows = [
        spread("house: CPU s to the first step", ours),
        spread("  of it: API", [one["api"] for one in starts]),
        spread("  of it: worker", [one["worker"] for one in starts]),
        spread("  of it: trainer", [one["trainer"] for one in starts]),
        spread("house: wall s", [one["wall"] for one in starts]),
        spread("house, data checked before: CPU s", [one["cpu"] for one in again]),
        spread("cold TRL: CPU s to the first step", theirs),
        spread("cold TRL: wall s (process)", [one["wall"] for one in peers]),
    ]
    ratio = statistics.median(theirs) / statistics.median(ours)
    rows.append(["cold TRL / house, CPU", round(ratio, 1), "", ""])
    rows.append(spread("cancel to no process, s", [one["took"] for one in cancels]))
    rows.append(spread("  a step of that job, s", [one["step"] for one in cancels]))
    rows.append(["API idle, MB", round(idle, 1), "", ""])
    return rows


def spread(name: str, values: list[float]) -> list[Any]:
    numbers = (statistics.median(values), min(values), max(values))
    return [name, *(round(one, 3) for one in numbers)]


def the_worker(server: psutil.Process) -> psutil.Process:
    return next(
        child for child in server.children() if "tunesmith.work.worker" in " ".join(child.cmdline())
    )


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    raise SystemExit(main())

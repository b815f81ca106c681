"""Four LoRA configurations over one base: what `bench/train.py --sweep 4` runs.

Ours is one job of a sweep, in one process from a cold start to its artifact; TRL's are processes
one after the other, from a cold start to the saved adapter. Time is CPU and wall of whole
processes; memory the peak of ours against what TRL's would take at once: each one's own pages, and
those that they share (libraries) once.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import start
from pipe import QUIET
from tunesmith.data import samples as documents
from tunesmith.spec.pipe import Inputs, Plan, TrainerTask
from tunesmith.spec.train import Lora, Optim, Run, Sft, Sweepable
from tunesmith.train.process import Asks
from tunesmith.train.report import Report
from tunesmith.train.sweep import job_for
from workload import ALPHA, BATCH, LONGEST, TARGETS, VOCABULARY

STEPS = 20
RATES, RANKS = (1e-4, 2e-4, 4e-4, 8e-4), (8, 16)
TIME_BAR, MEMORY_BAR = 0.4, 0.4


@dataclass(frozen=True)
class Spent:
    """By a whole process."""

    cpu: float
    wall: float
    peak_mb: float
    said: str


def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, data = prepare(folder, folder / "llama", asked.longest)
    grid = list(product(RATES, RANKS))[: asked.sweep]
    spec = spec_of(model, data, grid)
    ours, swept = sweep(spec, folder, asked.threads)
    print(f"  ours  one job          {ours.cpu:7.1f} CPU s {ours.wall:7.1f} s", flush=True)
    solo = {
        name: alone(one, folder, name, asked.threads) for name, one in spec.configurations().items()
    }
    peers = []
    for rate, rank in grid:
        peers.append(trl(model, data, (rate, rank), asked.threads))
        told = peers[-1]
        print(
            f"  trl   {rate:g}, rank {rank:2} {told.cpu:7.1f} CPU s {told.wall:7.1f} s", flush=True
        )
    return summarise(ours, peers, (swept, solo), asked)


def prepare(folder: Path, model: Path, longest: int) -> tuple[str, str]:
    """A tokenizer beside the ten-million-parameter Llama, and rows for each step once."""
    words = " ".join(documents.documentation_text(600_000, 0)).split()
    tokenizer = documents.train_tokenizer([" ".join(words)], VOCABULARY)
    documents.write_tokenizer(tokenizer, model)
    per_token = len(words) / len(tokenizer.encode(" ".join(words)).ids)
    lines = list(islice(start.rows(words, per_token, random.Random(0), longest), STEPS * BATCH))
    data = folder / "rows.jsonl"
    data.write_text("".join(lines))
    return str(model), str(data)


def spec_of(model: str, data: str, grid: list[tuple[float, int]]) -> Sft:
    trials = tuple({"learning_rate": rate, "rank": rank} for rate, rank in grid)
    return Sft(
        model=model,
        dataset=data,
        max_length=LONGEST,
        overlong="truncate",
        lora=Lora(alpha=ALPHA, targets=TARGETS),
        optim=Optim(batch_size=BATCH, max_steps=STEPS, scheduler="linear"),
        run=Run(save_seconds=3600),
        sweep={"trials": trials},  # type: ignore[arg-type]
    )


def task_of(spec: Sweepable, folder: Path, name: str, threads: int) -> TrainerTask:
    return TrainerTask(
        job_id="0" * 8,
        fence=1,
        spec=spec,
        inputs=Inputs(model=spec.model, dataset=spec.dataset),
        attempt_dir=str(folder / name),
        plan=Plan(threads=threads),
    )


def sweep(spec: Sft, folder: Path, threads: int) -> tuple[Spent, dict[str, list[float]]]:
    """The whole job, and each trial's losses."""
    place = folder / "task.json"
    place.write_text(task_of(spec, folder, "sweep", threads).model_dump_json())
    spent = measure(["-m", "tunesmith.train", "--task", str(place)], threads)
    losses: dict[str, list[float]] = {name: [] for name in spec.configurations()}
    for line in spent.said.splitlines():
        event = json.loads(line)
        if event["type"] == "step":
            losses[event["trial"]].append(event["loss"])
    return spent, losses


def alone(spec: Sweepable, folder: Path, name: str, threads: int) -> list[float]:
    """The losses of one configuration as a job by itself, in this process."""
    place = folder / f"{name}.events"
    with place.open("wb") as file:
        job_for(task_of(spec, folder, name, threads), Report(file.fileno()), Asks()).run()
    events = [json.loads(line) for line in place.read_text().splitlines()]
    return [event["loss"] for event in events if event["type"] == "step"]


def trl(model: str, data: str, trial: tuple[float, int], threads: int) -> Spent:
    question = {
        "model": model,
        "data": data,
        "steps": STEPS,
        "batch": BATCH,
        "longest": LONGEST,
        "learning_rate": trial[0],
        "rank": trial[1],
        "alpha": ALPHA,
        "targets": list(TARGETS),
    }
    script = str(Path(__file__).with_name("sweep_trl.py"))
    return measure([script, json.dumps(question)], threads)


def measure(arguments: list[str], threads: int) -> Spent:
    """Run a Python process to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{arguments[:3]} ended with {status}: {said[-2000:]}")
    wall = time.perf_counter() - began
    return Spent(used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024, said)


def summarise(
    ours: Spent,
    peers: list[Spent],
    losses: tuple[dict[str, list[float]], dict[str, list[float]]],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    told = [json.loads(one.said.strip().splitlines()[-1]) for one in peers]
    shared = max(one["shared"] for one in told) / (1 << 20)
    at_once = shared + sum(one.peak_mb - shared for one in peers)
    swept, solo = losses
    figures = {
        "CPU time, of TRL's one after another": ours.cpu / sum(one.cpu for one in peers),
        "wall time, of TRL's one after another": ours.wall / sum(one.wall for one in peers),
        "peak memory, of TRL's at once": ours.peak_mb / at_once,
    }
    bars = [
        {"name": name, "value": value, "bar": TIME_BAR, "is_met": value <= TIME_BAR}
        for name, value in figures.items()
    ]
    differing = sum(swept[name] != solo[name] for name in swept)
    name = "configurations whose losses differ from a job's alone"
    bars.append({"name": name, "value": differing, "bar": 0, "is_met": differing == 0})
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "steps": STEPS,
        "batch": BATCH,
        "longest": asked.longest,
        "ours": {"cpu": ours.cpu, "wall": ours.wall, "peak_mb": ours.peak_mb},
        "trl": [{"cpu": one.cpu, "wall": one.wall, "peak_mb": one.peak_mb} for one in peers],
        "trl_at_once_mb": at_once,
        "trl_shared_mb": shared,
        "losses": {"ours": swept, "trl": [one["losses"] for one in told]},
        "bars": bars,
    }


def show(report: dict[str, Any]) -> None:
    peers = report["trl"]
    print(
        f"\n{report['machine']}, {report['threads']} thread(s); {report['steps']} steps of "
        f"{report['batch']} samples of up to {report['longest']} tokens, {len(peers)} "
        "configurations\n"
    )
    lines = [
        ("ours, one job", report["ours"]),
        *((f"trl {n}", one) for n, one in enumerate(peers, 1)),
    ]
    for name, one in lines:
        print(f"{name:16}{one['cpu']:8.1f} CPU s{one['wall']:8.1f} s{one['peak_mb']:8.0f} MB")
    print(f"{'trl at once':16}{'':22}{report['trl_at_once_mb']:12.0f} MB")

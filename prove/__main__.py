"""Run the proofs, print one table, write the report.

    PYTHONPATH=tests python -m prove [--long] [--only storm,sim] [--db sqlite] [--seed N]

Ends with 1 where a figure misses its bar. What a proof that failed left behind is kept, and named.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from prove.proof import Figure, Result, Setting
from prove.report import Proven, print_table, write

PROOFS = {
    "sim": "the store under a virtual clock, and with each guard removed",
    "storm": "kills and zombies in a busy house",
    "parity": "losses and weights across kills",
    "resume": "every method, broken off and gone on with",
    "torn": "kills while a checkpoint is written, flipped bytes",
    "cancel": "cancels against claims, steps and ends",
    "broker": "Redis down, flushed, and saying things six times",
    "recovery": "how soon things are back",
    "sse": "many subscribers, with reconnects",
    "submissions": "durable submissions over HTTP",
    "listing": "a hundred of ten thousand jobs",
}
BESIDE = ("sim",)
"""Want processors and nothing else: at the lowest priority, beside those that come first."""
TIMED = ("recovery", "sse", "submissions", "listing")
"""Nothing runs beside these: they measure seconds."""
DATABASES = ("sqlite", "postgresql")
QUIET_SECONDS = 15.0
"""Between two words of how far it is, where nobody sees the line that shows it."""


def main(argv: list[str] | None = None) -> int:
    chosen = _parser().parse_args(argv)
    names = chosen.only or list(PROOFS)
    databases = DATABASES if chosen.db == "both" else (chosen.db,)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    proven: list[Proven] = []

    def run(name: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"prove-{name}-")).resolve()
        setting = Setting(folder, chosen.seed, chosen.long, databases, chosen.scale, chosen.record)
        proven.append(prove(name, setting, line))
        write(chosen.out, setting, proven)

    with _line(console) as line, ThreadPoolExecutor(len(BESIDE)) as pool:
        beside = [pool.submit(run, name) for name in names if name in BESIDE]
        for name in (name for name in names if name not in BESIDE):
            if name in TIMED:
                wait(beside)
            run(name)
    print_table(console, proven)
    console.print(f"written to {chosen.out}")
    return 0 if all(one.result.is_met for one in proven) else 1


def prove(name: str, setting: Setting, line: Progress) -> Proven:
    """One proof, with a line that shows how far it is. A proof that breaks off has failed."""
    started = heard = time.monotonic()
    task = line.add_task(PROOFS[name], total=None, note="")
    is_seen = line.console.is_terminal

    def show(done: int, total: int, note: str) -> None:
        nonlocal heard
        line.update(task, completed=done, total=total, note=note)
        if not is_seen and time.monotonic() - heard > QUIET_SECONDS:
            heard = time.monotonic()
            line.console.print(f"{name}: {done}/{total} {note}, {heard - started:.0f} s")

    try:
        run: Callable[..., Result] = importlib.import_module(f"prove.{name}").run
        result = run(setting, show)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        told = f"broke off: {type(error).__name__}: {error}"
        result = Result((Figure("comes to an end", "yes", told[:200], False),))
    took = time.monotonic() - started
    line.stop_task(task)
    line.console.print(f"{name}: {'met' if result.is_met else '[red]missed'}, {took:.0f} s")
    if result.is_met:
        shutil.rmtree(setting.folder, ignore_errors=True)
    else:
        line.console.print(f"[red]{name}: its remains are in {setting.folder}")
    return Proven(name, result, took)


def _line(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prove", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--long", action="store_true", help="the long settings: hours")
    parser.add_argument("--only", type=_names, help=f"some of: {', '.join(PROOFS)}")
    parser.add_argument("--db", choices=(*DATABASES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=1, help="of every throw of the dice")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts; for a quick look")
    parser.add_argument("--record", type=Path, help="of schedules played: go on from it")
    parser.add_argument("--out", type=Path, default=Path("prove/report.json"))
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PROOFS:
            raise argparse.ArgumentTypeError(f"no proof {name!r}; one of {', '.join(PROOFS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

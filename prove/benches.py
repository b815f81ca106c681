"""Figures that a benchmark measures and judges: run it, take over its verdicts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prove.proof import Figure, Result, Setting

BENCH = Path(__file__).resolve().parents[1] / "bench"
PATIENCE_SECONDS = 1800


def bench(setting: Setting, name: str, *arguments: str) -> Result:
    """Of `bench/<name>.py`; what it printed is in the detail."""
    report = setting.inner(name) / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *arguments, "--json", str(report)],
        env=os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "tests")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    if not report.exists():
        told = f"no figures, status {done.returncode}"
        figure = Figure(f"bench/{name}.py", "figures", told, False)
        return Result((figure,), {name: done.stdout[-4000:]})
    found = json.loads(report.read_text())
    figures = tuple(map(_figure, found["verdicts"]))
    return Result(figures, {name: found["figures"]})


def database_arguments(setting: Setting) -> tuple[str, str]:
    names = {"sqlite": "sqlite", "postgresql": "postgres"}
    both = len(setting.databases) > 1
    return "--database", "both" if both else names[setting.databases[0]]


def _figure(verdict: dict[str, Any]) -> Figure:
    signs = {"<=": "≤", ">=": "≥"}
    sign = signs.get(verdict["sign"], verdict["sign"])
    value = f"{verdict['value']:g}"
    return Figure(verdict["figure"], f"{sign} {verdict['bar']:g}", value, verdict["is_met"])

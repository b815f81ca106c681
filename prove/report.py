"""What was proven, as a table for people and as JSON for the record."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prove.proof import Result, Setting

_PACKAGES = ("tunesmith", "torch", "transformers", "sqlalchemy", "psycopg", "pysqlite3", "celery")


@dataclass(frozen=True)
class Proven:
    name: str
    result: Result
    seconds: float


def print_table(console: Console, proven: Sequence[Proven]) -> None:
    table = Table(show_lines=False)
    for name in ("proof", "what", "bar", "came out", "ok"):
        table.add_column(name, justify="right" if name in ("bar", "came out") else "left")
    for one in proven:
        name = f"{one.name} ({one.seconds:.0f} s)"
        for figure in one.result.figures:
            mark = "[green]yes" if figure.is_met else "[bold red]NO"
            table.add_row(name, figure.what, figure.bar, figure.came_out, mark)
            name = ""
        table.add_section()
    console.print(table)


def write(path: Path, setting: Setting, proven: Sequence[Proven]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(as_json(setting, proven), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


def as_json(setting: Setting, proven: Sequence[Proven]) -> dict[str, Any]:
    return {
        "seed": setting.seed,
        "is_long": setting.is_long,
        "scale": setting.scale,
        "databases": setting.databases,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **_versions()},
        "is_met": all(one.result.is_met for one in proven),
        "proofs": [
            {
                "name": one.name,
                "seconds": round(one.seconds, 1),
                "is_met": one.result.is_met,
                **asdict(one.result),
            }
            for one in proven
        ],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

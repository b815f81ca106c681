"""`GET /jobs?limit=100` of 10,000 jobs: wall and CPU at an otherwise idle server.

python bench/list.py [--database sqlite|postgres|both] [--jobs N] [--rounds N] [--json PATH]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from clients import Drivers
from filled import fill
from served import Server, database
from table import judge, print_table, write_json
from tunesmith.settings import Settings

PATHS = {
    "the newest 100": "/jobs?limit=100",
    "  of those pending": "/jobs?limit=100&status=pending",
    "  of those running": "/jobs?limit=100&status=running",
    "  after 9,000": "/jobs?limit=100&offset=9000",
}
BARS = {
    "sqlite: the newest 100, p50 ms": ("<=", 5.0),
    "postgres: the newest 100, p50 ms": ("<=", 5.0),
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--database", default="both", choices=["sqlite", "postgres", "both"])
    arguments.add_argument("--jobs", type=int, default=10_000)
    arguments.add_argument("--rounds", type=int, default=200)
    arguments.add_argument("--json", type=Path, default=Path("bench/out/list.json"))
    chosen = arguments.parse_args()
    kinds = ["sqlite", "postgres"] if chosen.database == "both" else [chosen.database]
    rows = [row for kind in kinds for row in measure(kind, chosen)]
    print_table(["figure", "p50 ms", "p99 ms", "CPU ms"], rows)
    figures = {f"{row[0]}, p50 ms": float(row[1]) for row in rows}
    bars = {name: bar for name, bar in BARS.items() if name in figures}
    write_json(chosen.json, {"figures": rows, "verdicts": judge(figures, bars)})
    return 0


def measure(kind: str, chosen: argparse.Namespace) -> list[tuple[str, float, float, float]]:
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        workspace = Path(folder) / "workspace"
        workspace.mkdir()
        with database(kind, Path(folder)) as over:
            server = Server(workspace, over)
            fill(Settings.read(server.environment), chosen.jobs, 0)
            server.start()
            try:
                return [
                    (f"{kind}: {name}", *ask(server, path, chosen)) for name, path in PATHS.items()
                ]
            finally:
                server.stop()


def ask(server: Server, path: str, chosen: argparse.Namespace) -> tuple[float, float, float]:
    """p50 and p99 of the wall time, and the server's CPU time of one, in milliseconds."""
    once(server, path, 20)
    time.sleep(1.0)
    before = server.cpu()
    waits = sorted(once(server, path, chosen.rounds))
    used = server.cpu() - before
    p99 = waits[int(len(waits) * 0.99)]
    return milli(statistics.median(waits)), milli(p99), milli(used / chosen.rounds)


def once(server: Server, path: str, count: int) -> list[float]:
    drivers = Drivers(server.url, processes=1)
    drivers.start(1, count, path=path)
    (found,) = drivers.join()
    if set(found["statuses"]) != {"200"}:
        raise RuntimeError(f"refused: {found['statuses']}")
    return list(found["waits"])


def milli(seconds: float) -> float:
    return round(seconds * 1e3, 2)


if __name__ == "__main__":
    raise SystemExit(main())

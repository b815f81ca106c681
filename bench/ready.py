"""From the start of the process to /health/ready with 10,000 jobs waiting and 10,000 ended.

    python bench/ready.py [--database sqlite|postgres|both] [--jobs N] [--rounds N] [--json PATH]

Before each start the server before was killed by SIGKILL in mid-work, so that what the database
has to recover is included. "At once" is how long one request waits that is sent as soon as the
port takes connections.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from filled import fill
from served import Server, database, prepare
from submit import burst
from table import judge, print_table, write_json
from tunesmith.settings import Settings

BARS = {"sqlite: ready, s": ("<=", 2.0), "postgres: ready, s": ("<=", 2.0)}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--database", default="both", choices=["sqlite", "postgres", "both"])
    arguments.add_argument("--jobs", type=int, default=10_000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path, default=Path("bench/out/ready.json"))
    chosen = arguments.parse_args()
    kinds = ["sqlite", "postgres"] if chosen.database == "both" else [chosen.database]
    rows = [row for kind in kinds for row in measure(kind, chosen)]
    print_table(["figure", "median", "least", "most"], rows)
    figures = {name: median for name, median, *_ in rows}
    bars = {name: bar for name, bar in BARS.items() if name in figures}
    write_json(chosen.json, {"figures": rows, "verdicts": judge(figures, bars)})
    return 0


def measure(kind: str, chosen: argparse.Namespace) -> list[tuple[str, float, float, float]]:
    walls, used, memory = [], [], []
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        workspace = Path(folder) / "workspace"
        workspace.mkdir()
        prepare(workspace)
        with database(kind, Path(folder)) as over:
            server = Server(workspace, over)
            fill(Settings.read(server.environment), chosen.jobs, chosen.jobs)
            server.start()
            for _ in range(chosen.rounds):
                burst(server, 16, 320)
                server.kill()
                walls.append(server.start())
                used.append(server.cpu())
                memory.append(server.memory())
            server.stop()
    return [
        (f"{kind}: ready, s", *spread(walls)),
        (f"{kind}:   CPU s", *spread(used)),
        (f"{kind}:   memory, MB", *spread(memory)),
    ]


def spread(values: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(values), 2), round(min(values), 2), round(max(values), 2)


if __name__ == "__main__":
    raise SystemExit(main())

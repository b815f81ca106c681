"""Rows of a data set checked in a minute: python bench/data.py [--rows N …] [--json PATH]

The structure of short conversations, as at a submit or an upload: every field's type, twins, the
file's digest. Each file in a process of its own; one process checks one file, so with two cores two
files go on at once, which is measured as well. Prints a table, writes a JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from table import judge, print_table, write_json

BARS = {
    "rows a minute": (">=", 300_000.0),
    "peak memory of the largest, over that of the smallest": ("<=", 1.25),
}
TEXT = "river stone 강물 바위 水 石头 cloud 구름 云 tree 나무 树 light 빛 光 🌊 night 밤 夜"
WORDS = TEXT.split()
CHECK = """
import json, re, resource, sys, time
from pathlib import Path
from tunesmith.data.rows import check_file

cpu, began = time.process_time(), time.perf_counter()
report = check_file(Path(sys.argv[1]))
assert report.is_usable, report.faults
print(json.dumps({
    "rows": report.num_samples,
    "seconds": time.perf_counter() - began,
    "cpu_seconds": time.process_time() - cpu,
    "peak_mb": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "out" / "data.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / f"{rows}.jsonl", rows) for rows in sorted(asked.rows)]
        alone = [run([path]) for path in paths]
        together = run([paths[0], paths[0]])
        size = paths[0].stat().st_size / min(asked.rows)
    machine = platform.processor() or platform.machine()
    print(f"{machine}; {size:.0f} bytes a row\n")
    print_table(
        ("rows", "CPU s", "s", "peak", "rows a minute"), [*map(line, alone), line(together)]
    )
    print("the last line: two files at once\n")
    figures = {
        "rows a minute": min(map(rows_a_minute, alone)),
        "peak memory of the largest, over that of the smallest": (
            alone[-1]["peak_mb"] / alone[0]["peak_mb"]
        ),
    }
    bars = judge(figures, BARS)
    write_json(asked.json, {"alone": alone, "together": together, "bars": bars})
    raise SystemExit(0 if all(bar["is_met"] for bar in bars) else 1)


def line(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{one['rows']:,}",
        f"{one['cpu_seconds']:.1f}",
        f"{one['seconds']:.1f}",
        f"{one['peak_mb']:.0f} MB",
        f"{rows_a_minute(one):,.0f}",
    )


def rows_a_minute(one: dict[str, Any]) -> float:
    return float(60 * one["rows"] / one["seconds"])


def write(path: Path, rows: int) -> Path:
    """Short conversations, each with a number of its own."""
    with path.open("w", encoding="utf-8") as file:
        for at in range(rows):
            said = [" ".join(WORDS[(at * 7 + k) % len(WORDS)] for k in range(n)) for n in (6, 9)]
            messages = [
                {"role": "user", "content": f"{said[0]} {at}?"},
                {"role": "assistant", "content": said[1]},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def run(paths: list[Path]) -> dict[str, Any]:
    """All at once; their rows together, the longest time, the largest memory."""
    children = [
        subprocess.Popen([sys.executable, "-c", CHECK, str(path)], stdout=subprocess.PIPE)
        for path in paths
    ]
    told = []
    for child in children:
        out, _ = child.communicate()
        assert child.returncode == 0
        told.append(json.loads(out))
    return {
        "rows": sum(one["rows"] for one in told),
        "seconds": max(one["seconds"] for one in told),
        "cpu_seconds": sum(one["cpu_seconds"] for one in told),
        "peak_mb": max(one["peak_mb"] for one in told),
    }


if __name__ == "__main__":
    main()

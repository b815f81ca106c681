"""Durable submissions: what each costs the server, and that a kill loses none it acknowledged."""

from prove.benches import bench, database_arguments
from prove.proof import Progress, Result, Setting


def run(setting: Setting, progress: Progress) -> Result:
    progress(0, 1, "bench/submit.py")
    count = setting.count(10_000, 50_000)
    return bench(setting, "submit", *database_arguments(setting), "--count", str(count))

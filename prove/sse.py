"""Many subscribers of one server's events, some of whom go away and come back."""

from prove.benches import bench, database_arguments
from prove.proof import Progress, Result, Setting


def run(setting: Setting, progress: Progress) -> Result:
    progress(0, 1, "bench/sse.py")
    readers = setting.count(1000, 2000)
    counts = ("--readers", str(readers), "--returning", str(readers * 3 // 10))
    return bench(setting, "sse", *database_arguments(setting), *counts)

"""How long the newest hundred of 10,000 jobs take to list."""

from prove.benches import bench, database_arguments
from prove.proof import Progress, Result, Setting


def run(setting: Setting, progress: Progress) -> Result:
    progress(0, 1, "bench/list.py")
    return bench(setting, "list", *database_arguments(setting))

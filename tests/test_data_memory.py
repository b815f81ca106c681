"""A corpus is read in memory that does not grow with it: checked, opened, packed, dealt out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train_fixtures import WORDS, make_model

CHILD = """
import json, re, sys
from pathlib import Path
from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex, check_file
from tunesmith.train.batches import Feed
from tunesmith.train.pretrain import BlockSource

path, reading = Path(sys.argv[1]), Reading(controls="refused")
assert check_file(path, reading=reading).is_usable
with RowIndex.open(path, reading) as rows:
    feed = Feed(BlockSource(rows, Renderer.load(Path(sys.argv[2])), 256, 7), 8)
    while feed.epoch == 0:
        feed.take()
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps({"peak_kb": int(peak), "blocks": feed.epoch_samples}))
"""
SMALL, LARGE = 500, 5_000
"""Documents; 0.4 and 4 MB of them."""
ROOM_MB = 2
"""What the larger one may take more: 24 bytes for each row, and what the allocator keeps."""


def write(path: Path, documents: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for at in range(documents):
            text = " ".join(WORDS[(at * 7 + k * (1 + at % 5)) % len(WORDS)] for k in range(150))
            is_rows = path.suffix == ".jsonl"
            file.write(json.dumps({"text": text}, ensure_ascii=False) if is_rows else f"{text}\n")
            file.write("\n")
    return path


def peak_mb(path: Path, model: Path) -> tuple[float, int]:
    """Of a process of its own that reads one epoch; and the blocks that it had."""
    command = [sys.executable, "-c", CHILD, str(path), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return told["peak_kb"] / 1024, told["blocks"]


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_larger_corpus_takes_no_more_memory(tmp_path: Path, suffix: str) -> None:
    model = make_model(tmp_path / "model")
    small, few = peak_mb(write(tmp_path / f"small.{suffix}", SMALL), model)
    large, many = peak_mb(write(tmp_path / f"large.{suffix}", LARGE), model)
    assert many > 9 * few
    assert large - small < ROOM_MB

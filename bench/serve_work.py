"""What both sides of `bench/serve.py` answer: the same prompts, the same number of new tokens.

Imports nothing, so that it runs in every peer's environment.
"""

import random
from pathlib import Path

PROMPT = 128
NEW = 48
VOCABULARY = 32_000


def peak_mb() -> float:
    """Of this process: what the kernel counts for a child begins with its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def prompts(count: int, length: int = PROMPT, seed: int = 0) -> list[list[int]]:
    """Ids that are letters and words, no special ones."""
    dice = random.Random(seed)
    return [[dice.randrange(300, 1500) for _ in range(length)] for _ in range(count)]

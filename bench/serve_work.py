"""What both sides of `bench/serve.py` answer: the same prompts, the same number of new tokens.

Imports nothing, so that it runs in every peer's environment.
"""

import random

PROMPT = 128
NEW = 48
VOCABULARY = 32_000


def prompts(count: int, length: int = PROMPT, seed: int = 0) -> list[list[int]]:
    """Ids that are letters and words, no special ones."""
    dice = random.Random(seed)
    return [[dice.randrange(300, 1500) for _ in range(length)] for _ in range(count)]

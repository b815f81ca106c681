"""A tiny task with an answer that can be checked, and a model that guesses at it."""

from pathlib import Path
from typing import Any

import torch

from train_fixtures import WORDS, Place, make_model, run_here, sft, write_rows
from tunesmith.spec.pipe import Inputs

ASKED = WORDS[:8]
ANSWERS = [f" {word}" for word in WORDS[8:13]]
MATCH: list[dict[str, Any]] = [{"kind": "exact_match"}]


def guessing(folder: Path, epochs: int = 15, words: int = 8) -> Place:
    """After SFT: to each of so many words the model answers one of five, each as likely; wanted is
    a certain one."""
    torch.set_num_threads(1)
    guesses = [{"prompt": word, "completion": told} for word in ASKED[:words] for told in ANSWERS]
    start = Place(folder, make_model(folder / "model"), write_rows(folder / "s.jsonl", guesses))
    spec = sft(epochs=epochs, batch_size=5 * words, learning_rate=1e-2)
    ended = run_here(start.task(spec))
    (folder / "rl").mkdir()
    wanted = [
        {"prompt": word, "reference": ANSWERS[place * 3 % 5].strip()}
        for place, word in enumerate(ASKED[:words])
    ]
    return Place(
        folder / "rl", Path(ended.last["artifact"]), write_rows(folder / "rl.jsonl", wanted * 16)
    )


def inputs_of(place: Place, rows: list[dict[str, Any]], name: str) -> Inputs:
    return Inputs(model=str(place.model), dataset=str(write_rows(place.folder / name, rows)))

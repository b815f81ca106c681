"""Drawing next tokens: python bench/draw.py [--rows N] [--vocabulary N]

A step's logits to its ids, over each kind of wish, beside transformers' own processors with one
`multinomial` for the batch (the same wishes for all rows, which suits them best). Interleaved, CPU
time, the median of rounds. Prints a table, writes a JSON.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from table import judge, print_table, write_json
from tunesmith.infer.draw import Draw
from tunesmith.infer.sampler import sample
from tunesmith.spec.chat import Sampling

WISHES: Mapping[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 0.7, "top_k": 50},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "min-p": {"temperature": 0.7, "min_p": 0.05},
    "repetition": {"temperature": 0, "repetition_penalty": 1.1},
}
BARS = {"top-p": ("<=", 0.5), "top-k, top-p": ("<=", 0.5), "temperature": ("<=", 1.0)}
PROMPT = 512


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    logits_BV = torch.randn(asked.rows, asked.vocabulary) * 3
    logits_BV[:, :20] += 8  # a head of likely tokens, as a model's
    ids_BT = torch.randint(asked.vocabulary, (asked.rows, PROMPT))
    rows, ratios = [], {}
    for name, wishes in WISHES.items():
        draws = [Draw(Sampling(**wishes), prompt) for prompt in ids_BT.tolist()]
        processors = _processors(wishes)
        ours, beside = _interleaved(
            asked.rounds,
            lambda draws=draws: sample(logits_BV, draws),
            lambda processors=processors, wishes=wishes: _drawn(
                processors(ids_BT, logits_BV), wishes["temperature"] > 0
            ),
        )
        ratios[name] = round(ours / beside, 3)
        rows.append([name, f"{ours * 1e3:.2f}", f"{beside * 1e3:.2f}", ratios[name]])
    print_table(["wish", "ours, CPU ms", "transformers, CPU ms", "ratio"], rows)
    bars = judge(ratios, BARS)
    sizes = {"rows": asked.rows, "vocabulary": asked.vocabulary, "threads": asked.threads}
    write_json(asked.json, {**sizes, "ratios": ratios, "rows": rows, "bars": bars})
    raise SystemExit(0 if all(bar["is_met"] for bar in bars) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "out" / "draw.json")
    return parser.parse_args()


def _processors(wishes: Mapping[str, Any]) -> LogitsProcessorList:
    made = {
        "repetition_penalty": lambda value: theirs.RepetitionPenaltyLogitsProcessor(value),
        "temperature": lambda value: theirs.TemperatureLogitsWarper(value),
        "top_k": lambda value: theirs.TopKLogitsWarper(value),
        "top_p": lambda value: theirs.TopPLogitsWarper(value),
        "min_p": lambda value: theirs.MinPLogitsWarper(value),
    }
    wanted = [name for name in made if wishes.get(name)]
    return LogitsProcessorList([made[name](wishes[name]) for name in wanted])


def _drawn(scores_BV: Tensor, is_drawn: bool) -> list[int]:
    if not is_drawn:
        return scores_BV.argmax(dim=-1).tolist()
    return torch.multinomial(scores_BV.softmax(dim=-1), 1)[:, 0].tolist()


def _interleaved(rounds: int, *ways: Callable[[], Any]) -> list[float]:
    """Seconds of CPU time of each, the median of the rounds after the first."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for kept, way in zip(found, ways, strict=True):
            began = time.process_time()
            way()
            kept.append(time.process_time() - began)
    return [median(kept[1:]) for kept in found]


if __name__ == "__main__":
    main()

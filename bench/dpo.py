"""Preference training against TRL's DPOTrainer: what `bench/train.py --method dpo` runs.

Pairs in a CPU second, both sides on the same pairs with the same updates, each in a process of its
own, taking turns within a round. "kept" leaves the reference's pass out of the clock on both sides.
"""

import argparse
import platform
from dataclasses import asdict
from statistics import median
from typing import Any

from pipe import Side
from workload import PAIRS, Work

VARIANTS = (
    ("trl", "full", False),
    ("trl", "full kept", False),
    ("ours", "full", False),
    ("ours", "full kept", False),
    ("trl", "lora", True),
    ("trl", "lora kept", True),
    ("ours", "lora", True),
    ("ours", "lora kept", True),
)
BARS = (("", "", 2.3), (" kept", "", 3.0), (" kept", " kept", 2.0))
"""Ours, TRL's, and how many times TRL's ours is to be."""
LOSS_BAR = 1e-4


def run(asked: argparse.Namespace, models: dict[str, str]) -> dict[str, Any]:
    sides = {
        "trl": Side("dpo_peers.py", asked.threads),
        "ours": Side("dpo_ours.py", asked.threads),
    }
    rounds = [_round(sides, models, asked) for _ in range(asked.rounds)]
    for side in sides.values():
        side.close()
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "steps": asked.steps,
        "rounds": asked.rounds,
        "batch": PAIRS,
        "variants": [_line(side, name, rounds) for side, name, _ in VARIANTS],
        "bars": [*_speed(rounds), *_losses(rounds)],
    }


def _round(
    sides: dict[str, Side], models: dict[str, str], asked: argparse.Namespace
) -> dict[str, Any]:
    measured = {}
    for side, name, is_lora in VARIANTS:
        work = Work(name, models["llama"], is_lora, asked.steps, asked.warm_up, asked.threads)
        found = sides[side].ask(**asdict(work))
        measured[f"{side} {name}"] = found
        print(f"  {side:5} {name:10} {_rate(found):6.2f} pairs/CPU s", flush=True)
    return measured


def _rate(found: dict[str, Any]) -> float:
    return float(found["pairs"] / found["cpu"])


def _line(side: str, name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found = [one[f"{side} {name}"] for one in rounds]
    return {
        "side": side,
        "name": name,
        "pairs_per_cpu_second": median(map(_rate, found)),
        "first_loss": found[0]["losses"][0],
        "last_loss": found[0]["losses"][-1],
    }


def _speed(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratio is taken within each round, and the median of the rounds counts."""
    bars = []
    for kind in ("full", "lora"):
        for ours, theirs, bar in BARS:
            ratio = median(
                _rate(one[f"ours {kind}{ours}"]) / _rate(one[f"trl {kind}{theirs}"])
                for one in rounds
            )
            name = f"{kind}{ours}, times TRL {kind}{theirs or ' with its reference inline'}"
            bars.append({"name": name, "value": ratio, "bar": bar, "is_met": ratio >= bar})
    return bars


def _losses(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all weights: adapters are drawn at random, on each side by its own dice."""
    pairs = zip(rounds[0]["ours full"]["losses"], rounds[0]["trl full"]["losses"], strict=True)
    worst = max(abs(a - b) / b for a, b in pairs)
    name = "full, largest relative difference of a step's loss"
    return [{"name": name, "value": worst, "bar": LOSS_BAR, "is_met": worst <= LOSS_BAR}]


def show(report: dict[str, Any]) -> None:
    print(
        f"\n{report['machine']}, {report['threads']} thread(s); {report['batch']} pairs a step, "
        f"{report['steps']} steps, {report['rounds']} rounds\n"
    )
    for one in report["variants"]:
        print(
            f"{one['side']:5}{one['name']:12}{one['pairs_per_cpu_second']:7.2f} pairs/CPU s  "
            f"{one['first_loss']:.6f} → {one['last_loss']:.6f}"
        )

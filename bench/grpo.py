"""Reinforcement against TRL's GRPOTrainer: what `bench/train.py --method grpo` runs.

Completions in a CPU second, drawn, rewarded and learnt from in one update, both sides on the same
prompts with the same number and longest length of completions, each in a process of its own, taking
turns within a round.
"""

import argparse
import platform
from dataclasses import asdict
from statistics import median
from typing import Any

from pipe import Side
from workload import ASKED, COMPLETION, GENERATIONS, Work

VARIANTS = (("trl", "full"), ("ours", "full"), ("trl", "lora"), ("ours", "lora"))
BAR = 2.0
LENGTH_BAR = 0.02
"""How far the sides' mean lengths may be apart: the work is to be the same."""


def run(asked: argparse.Namespace, models: dict[str, str]) -> dict[str, Any]:
    sides = {
        "trl": Side("grpo_peers.py", asked.threads),
        "ours": Side("grpo_ours.py", asked.threads),
    }
    rounds = [_round(sides, models, asked) for _ in range(asked.rounds)]
    for side in sides.values():
        side.close()
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "steps": asked.steps,
        "rounds": asked.rounds,
        "batch": ASKED * GENERATIONS,
        "variants": [_line(side, name, rounds) for side, name in VARIANTS],
        "bars": [*_speed(rounds), *_lengths(rounds)],
    }


def _round(
    sides: dict[str, Side], models: dict[str, str], asked: argparse.Namespace
) -> dict[str, Any]:
    measured = {}
    for side, name in VARIANTS:
        is_lora = name == "lora"
        work = Work(name, models["llama"], is_lora, asked.steps, asked.warm_up, asked.threads)
        found = sides[side].ask(**asdict(work))
        measured[f"{side} {name}"] = found
        print(f"  {side:5} {name:6} {_rate(found):6.2f} completions/CPU s", flush=True)
    return measured


def _rate(found: dict[str, Any]) -> float:
    return float(found["completions"] / found["cpu"])


def _line(side: str, name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found = [one[f"{side} {name}"] for one in rounds]
    return {
        "side": side,
        "name": name,
        "completions_per_cpu_second": median(map(_rate, found)),
        "length": found[0]["length"],
        "reward": found[0]["rewards"][-1],
    }


def _speed(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratio is taken within each round, and the median of the rounds counts."""
    bars = []
    for name in ("full", "lora"):
        ratio = median(_rate(one[f"ours {name}"]) / _rate(one[f"trl {name}"]) for one in rounds)
        told = f"{name}, times TRL"
        bars.append({"name": told, "value": ratio, "bar": BAR, "is_met": ratio >= BAR})
    return bars


def _lengths(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lengths = [rounds[0][f"{side} full"]["length"] for side in ("ours", "trl")]
    apart = abs(lengths[0] / lengths[1] - 1)
    name = "full, relative difference of the completions' mean length"
    return [{"name": name, "value": apart, "bar": LENGTH_BAR, "is_met": apart <= LENGTH_BAR}]


def show(report: dict[str, Any]) -> None:
    print(
        f"\n{report['machine']}, {report['threads']} thread(s); {report['batch']} completions of "
        f"at most {COMPLETION} tokens a step, {report['steps']} steps, {report['rounds']} rounds\n"
    )
    for one in report["variants"]:
        print(
            f"{one['side']:5}{one['name']:6}{one['completions_per_cpu_second']:7.2f} completions/"
            f"CPU s  {one['length']:.1f} tokens each, reward {one['reward']:.3f}"
        )

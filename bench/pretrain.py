"""Pretraining against Hugging Face's Trainer: what `bench/train.py --method pretrain` runs.

Tokens in a CPU second, both sides on the same blocks with the same updates, each in a process of
its own, taking turns within a round; and which share of the matmul peak the useful operations are.
"""

import argparse
import platform
from dataclasses import asdict
from statistics import median
from typing import Any

from pipe import Side
from workload import BATCH, BLOCK, Work, useful_flops_per_token

BAR, UTILISATION_BAR, LOSS_BAR = 1.35, 0.6, 1e-4


def run(asked: argparse.Namespace, models: dict[str, str]) -> dict[str, Any]:
    sides = {
        "trainer": Side("pretrain_peers.py", asked.threads),
        "ours": Side("pretrain_ours.py", asked.threads),
    }
    rounds = [_round(sides, models, asked) for _ in range(asked.rounds)]
    for side in sides.values():
        side.close()
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "steps": asked.steps,
        "rounds": asked.rounds,
        "blocks": BATCH,
        "block_tokens": BLOCK,
        "peak_gflops_per_cpu_second": max(one["ours"]["peak"] for one in rounds) / 1e9,
        "variants": [_line(side, rounds) for side in sides],
        "bars": _bars(rounds),
    }


def _round(
    sides: dict[str, Side], models: dict[str, str], asked: argparse.Namespace
) -> dict[str, Any]:
    measured = {}
    for name, side in sides.items():
        work = Work(name, models["llama"], False, asked.steps, asked.warm_up, asked.threads)
        measured[name] = side.ask(**asdict(work))
        print(f"  {name:8} {_rate(measured[name]):6.0f} tokens/CPU s", flush=True)
    return measured


def _rate(found: dict[str, Any]) -> float:
    return float(found["tokens"] / found["cpu"])


def _useful(found: dict[str, Any]) -> float:
    """Share of the peak that was measured just before and just after."""
    return _rate(found) * useful_flops_per_token([BLOCK], is_lora=False) / float(found["peak"])


def _line(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found = [one[name] for one in rounds]
    return {
        "name": name,
        "tokens_per_cpu_second": median(map(_rate, found)),
        "first_loss": found[0]["losses"][0],
        "last_loss": found[0]["losses"][-1],
    }


def _bars(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratio is taken within each round, and the median of the rounds counts."""
    ratio = median(_rate(one["ours"]) / _rate(one["trainer"]) for one in rounds)
    share = median(_useful(one["ours"]) for one in rounds)
    pairs = zip(rounds[0]["ours"]["losses"], rounds[0]["trainer"]["losses"], strict=True)
    worst = max(abs(mine - theirs) / theirs for mine, theirs in pairs)
    return [
        _bar("times Hugging Face's Trainer", ratio, BAR, ratio >= BAR),
        _bar("useful FLOPs over the measured matmul peak", share, UTILISATION_BAR, share >= 0.6),
        _bar("largest relative difference of a step's loss", worst, LOSS_BAR, worst <= LOSS_BAR),
    ]


def _bar(name: str, value: float, bar: float, is_met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "is_met": is_met}


def show(report: dict[str, Any]) -> None:
    print(
        f"\n{report['machine']}, {report['threads']} thread(s); {report['blocks']} blocks of "
        f"{report['block_tokens']} tokens a step, {report['steps']} steps, {report['rounds']} "
        f"rounds; matmul peak {report['peak_gflops_per_cpu_second']:.0f} GFLOP in a CPU second\n"
    )
    for one in report["variants"]:
        print(
            f"{one['name']:8}{one['tokens_per_cpu_second']:8.0f} tokens/CPU s"
            f"  {one['first_loss']:.6f} → {one['last_loss']:.6f}"
        )

"""Training speed against TRL's trainers: python bench/train.py [--method dpo] [--steps N] …

Useful tokens (padding does not count) in a CPU second, both sides on the same samples with the same
updates, each in a process of its own, taking turns within a round. Prints a table, writes a JSON.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import dpo
import grpo
import pretrain
import sweep
from pipe import Side
from workload import BATCH, LONGEST, SAMPLES, Work, samples, useful_flops_per_token, write_models


@dataclass(frozen=True)
class Variant:
    name: str
    side: str
    model: str = "llama"
    is_lora: bool = False


VARIANTS = (
    Variant("full default", "trl"),
    Variant("full grouped", "trl"),
    Variant("full packed", "trl"),
    Variant("full", "ours"),
    Variant("full compiled", "ours"),
    Variant("lora default", "trl", is_lora=True),
    Variant("lora grouped", "trl", is_lora=True),
    Variant("lora packed", "trl", is_lora=True),
    Variant("lora", "ours", is_lora=True),
    Variant("lora compiled", "ours", is_lora=True),
    Variant("gemma default", "trl", "gemma"),
    Variant("gemma", "ours", "gemma"),
)


@dataclass(frozen=True)
class Bar:
    """`ours` over the best of `peers` is to be at least `ratio`."""

    ours: str
    peers: tuple[str, ...]
    ratio: float


FULL_BEST, LORA_BEST = ("full grouped", "full packed"), ("lora grouped", "lora packed")
BARS = (
    Bar("full", ("full default",), 3.0),
    Bar("full", FULL_BEST, 1.25),
    Bar("lora", ("lora default",), 3.9),
    Bar("lora", LORA_BEST, 1.15),
    Bar("lora compiled", ("lora default",), 4.5),
    Bar("lora compiled", LORA_BEST, 1.35),
    Bar("gemma", ("gemma default",), 1.5),
)
UTILISATION_BAR = 0.45
LOSS_BAR = 1e-4
COMPARED = {"dpo": dpo, "grpo": grpo, "pretrain": pretrain}
"""Methods whose comparison is a file of its own."""


def main() -> None:
    asked = _arguments()
    chosen = [one for one in VARIANTS if not asked.variants or one.name in asked.variants]
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        if asked.sweep:
            report = sweep.run(asked, Path(folder))
            sweep.show(report)
        elif asked.method in COMPARED:
            compared = COMPARED[asked.method]
            report = compared.run(asked, models)
            compared.show(report)
        else:
            sides = {"trl": Side("peers.py", asked.threads), "ours": Side("ours.py", asked.threads)}
            rounds = [_round(chosen, sides, models, asked) for _ in range(asked.rounds)]
            for side in sides.values():
                side.close()
            report = summarise(rounds, asked)
            _print(report)
    _print_bars(report)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(report, indent=1))
    raise SystemExit(0 if all(line["is_met"] for line in report["bars"]) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["sft", *COMPARED], default="sft")
    parser.add_argument("--sweep", type=int, choices=range(1, 9), help="LoRA configurations")
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens, of a sweep's samples")
    parser.add_argument("--steps", type=int, default=6, help="measured, of each variant and round")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="*", choices=[one.name for one in VARIANTS])
    parser.add_argument("--json", type=Path, help="out/train.json, or out/<method>.json")
    asked = parser.parse_args()
    kind = "sweep" if asked.sweep else asked.method
    name = "train.json" if kind == "sft" else f"{kind}.json"
    asked.json = asked.json or Path(__file__).parent / "out" / name
    return asked


def _round(
    chosen: list[Variant], sides: dict[str, Side], models: dict[str, str], asked: argparse.Namespace
) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    peak = sides["ours"].ask(variant="peak", threads=asked.threads)
    for one in chosen:
        work = Work(
            one.name, models[one.model], one.is_lora, asked.steps, asked.warm_up, asked.threads
        )
        measured[one.name] = sides[one.side].ask(**asdict(work))
        rate = measured[one.name]["tokens"] / measured[one.name]["cpu"]
        print(f"  {one.side:5} {one.name:15} {rate:7.0f} tokens/CPU s", flush=True)
    again = sides["ours"].ask(variant="peak", threads=asked.threads)
    return {"peak": max(peak["peak"], again["peak"]), "measured": measured, **_library(peak)}


def _library(peak: dict[str, Any]) -> dict[str, Any]:
    return {"is_onednn": peak["is_onednn"]}


def summarise(rounds: list[dict[str, Any]], asked: argparse.Namespace) -> dict[str, Any]:
    peak = max(one["peak"] for one in rounds)
    lines = [_line(variant, rounds, peak, asked) for variant in VARIANTS]
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "steps": asked.steps,
        "rounds": asked.rounds,
        "batch": BATCH,
        "samples": SAMPLES,
        "peak_gflops_per_cpu_second": peak / 1e9,
        "is_onednn": rounds[0]["is_onednn"],
        "variants": [line for line in lines if line],
    }
    report["bars"] = [*_speed_bars(rounds), *_utilisation(report), *_loss_bars(rounds)]
    return report


def _line(
    variant: Variant, rounds: list[dict[str, Any]], peak: float, asked: argparse.Namespace
) -> dict[str, Any] | None:
    found = [one["measured"][variant.name] for one in rounds if variant.name in one["measured"]]
    if not found:
        return None
    lengths = [len(ids) for ids, _ in samples()]
    if variant.side == "ours":
        lengths = lengths[asked.warm_up * BATCH : (asked.warm_up + asked.steps) * BATCH]
    flops = useful_flops_per_token(lengths, is_lora=variant.is_lora)
    rate = median(one["tokens"] / one["cpu"] for one in found)
    return {
        "name": variant.name,
        "side": variant.side,
        "tokens_per_cpu_second": rate,
        "tokens_per_second": median(one["tokens"] / one["wall"] for one in found),
        "filled": found[0]["filled"],
        "utilisation": rate * flops / peak,
        "before_clock_cpu_seconds": [round(one["before"], 2) for one in found if "before" in one],
        "first_loss": found[0]["losses"][0],
        "last_loss": found[0]["losses"][-1],
        "is_lean": found[0].get("is_lean"),
    }


def _speed_bars(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratio is taken within each round, and the median of the rounds counts."""
    bars = []
    for bar in BARS:
        ratios = []
        for one in rounds:
            rates = {
                name: found["tokens"] / found["cpu"] for name, found in one["measured"].items()
            }
            if bar.ours in rates and all(peer in rates for peer in bar.peers):
                ratios.append(rates[bar.ours] / max(rates[peer] for peer in bar.peers))
        if ratios:
            name = f"{bar.ours}, times TRL {' or '.join(bar.peers)}"
            bars.append(_bar(name, median(ratios), bar.ratio, median(ratios) >= bar.ratio))
    return bars


def _utilisation(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = [one["utilisation"] for one in report["variants"] if one["name"] == "full"]
    name = "full, useful FLOPs over the measured matmul peak"
    return [_bar(name, one, UTILISATION_BAR, one >= UTILISATION_BAR) for one in found]


def _loss_bars(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Same batches, same updates: every step's loss, against TRL's default run."""
    bars = []
    for ours in ("full", "lora", "gemma"):
        peer = f"{ours} default"
        measured = rounds[0]["measured"]
        if ours in measured and peer in measured:
            pairs = zip(measured[ours]["losses"], measured[peer]["losses"], strict=True)
            worst = max(abs(a - b) / b for a, b in pairs)
            name = f"{ours}, largest relative difference of a step's loss"
            bars.append(_bar(name, worst, LOSS_BAR, worst <= LOSS_BAR))
    return bars


def _bar(name: str, value: float, bar: float, is_met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "is_met": is_met}


def _print(report: dict[str, Any]) -> None:
    print(
        f"\n{report['machine']}, {report['threads']} thread(s); matmul peak "
        f"{report['peak_gflops_per_cpu_second']:.0f} GFLOP in a CPU second "
        f"({'oneDNN' if report['is_onednn'] else 'MKL'}); {report['batch']} samples a step, "
        f"{report['steps']} steps, {report['rounds']} rounds\n"
    )
    print(f"{'':22}{'tokens/CPU s':>13}{'/s':>7}{'filled':>8}{'of peak':>9}  first → last loss")
    for one in report["variants"]:
        print(
            f"{one['side']:5}{one['name']:17}{one['tokens_per_cpu_second']:13.0f}"
            f"{one['tokens_per_second']:7.0f}{one['filled']:8.2f}{one['utilisation']:9.2f}"
            f"  {one['first_loss']:.6f} → {one['last_loss']:.6f}"
        )
    for one in report["variants"]:
        if one["name"].endswith("compiled"):
            print(f"{one['name']}: CPU s before the clock {one['before_clock_cpu_seconds']}")


def _print_bars(report: dict[str, Any]) -> None:
    print()
    for bar in report["bars"]:
        verdict = "met   " if bar["is_met"] else "MISSED"
        print(f"{verdict} {bar['value']:9.3g} (bar {bar['bar']}) {bar['name']}")


if __name__ == "__main__":
    main()

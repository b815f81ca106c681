"""Memory of the loss over a large vocabulary: python bench/loss.py [--tokens N] [--vocabulary N] …

Forward and backward from hidden states to their gradient and the head's, each way in a process of
its own: the most memory held above what the inputs and both gradients need. Prints a table, writes
a JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

BAR = 0.25
"""Of the plain way's memory."""
LOSS_BAR = 1e-5


def main() -> None:
    asked = _arguments()
    if asked.way:
        print(json.dumps(_measure(asked)))
        return
    found = {way: _in_a_child(way, asked) for way in ("plain", "ours")}
    ratio = found["ours"]["bytes"] / found["plain"]["bytes"]
    apart = abs(found["ours"]["loss"] / found["plain"]["loss"] - 1)
    held = found["ours"]["bytes"] / (4 * asked.tokens * asked.vocabulary)
    bars = [
        _bar("memory, over that of the plain loss", ratio, BAR, ratio <= BAR),
        _bar("memory, over that of the full logits", held, 1.0, held < 1),
        _bar("relative difference of the loss", apart, LOSS_BAR, apart <= LOSS_BAR),
    ]
    report = {"machine": platform.processor() or platform.machine(), **_sizes(asked)}
    report |= {"ways": found, "bars": bars}
    _show(report)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(report, indent=1))
    raise SystemExit(0 if all(bar["is_met"] for bar in bars) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "out" / "loss.json")
    parser.add_argument("--way", choices=["plain", "ours"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _sizes(asked: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(asked, name) for name in ("tokens", "vocabulary", "hidden", "threads")}


def _in_a_child(way: str, asked: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{name}={value}" for name, value in _sizes(asked).items()]
    command = [sys.executable, __file__, f"--way={way}", *options]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def _measure(asked: argparse.Namespace) -> dict[str, Any]:
    import resource
    import time

    import torch
    from torch.nn.functional import cross_entropy

    from tunesmith.nn.cross_entropy import linear_cross_entropy_sum

    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    hidden = torch.randn(asked.tokens, asked.hidden, requires_grad=True)
    head = torch.randn(asked.vocabulary, asked.hidden).mul_(0.02).requires_grad_()
    targets = torch.randint(asked.vocabulary, (asked.tokens,))
    gradients = [torch.ones_like(one) for one in (hidden, head)]  # as large as what comes
    small = linear_cross_entropy_sum(hidden[:32], head[:64], targets[:32] % 64)
    small.backward()  # type: ignore[no-untyped-call]
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del gradients
    hidden.grad = head.grad = None
    cpu, wall = time.process_time(), time.perf_counter()
    if asked.way == "ours":
        loss = linear_cross_entropy_sum(hidden, head, targets)
    else:
        loss = cross_entropy(hidden @ head.t(), targets, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        "bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - floor) * 1024,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "loss": loss.item() / asked.tokens,
    }


def _bar(name: str, value: float, bar: float, is_met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "is_met": is_met}


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['machine']}; {report['tokens']:,} tokens, {report['vocabulary']:,} entries, "
        f"hidden {report['hidden']}\n\n{'':8}{'memory':>10}{'CPU s':>8}{'s':>8}   loss"
    )
    for name, one in report["ways"].items():
        megabytes = one["bytes"] / 1e6
        print(f"{name:8}{megabytes:7.0f} MB{one['cpu']:8.1f}{one['wall']:8.1f}   {one['loss']:.6f}")
    print()
    for bar in report["bars"]:
        verdict = "met   " if bar["is_met"] else "MISSED"
        print(f"{verdict} {bar['value']:9.3g} (bar {bar['bar']}) {bar['name']}")


if __name__ == "__main__":
    main()

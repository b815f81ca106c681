"""Tokens a second of the engine beside its peers: on one machine, in one run, taking turns.

    python bench/serve.py [--rounds 2] [--threads 1] [--only fp32,int8,http,lora,mixed,prefix]

Peers run in environments of their own, made on the first run under `.bench/`. The unit is tokens in
two CPU seconds, what two cores that nobody else uses would do in a second; by wall beside it.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from statistics import median
from typing import Any

import serve_http as http
import serve_model
import serve_trained
import serve_venvs as venvs
from pipe import Side
from serve_work import NEW, PROMPT, prompts
from table import judge, print_table, write_json

CONCURRENCIES = (1, 8, 32)
IN_PROCESS = (
    ("transformers", "fp32"),
    ("vllm", "fp32"),
    ("ctranslate2", "fp32"),
    ("ours", "fp32"),
    ("ctranslate2", "int8"),
    ("openvino", "int8"),
    ("llama.cpp", "int8"),
    ("ours", "int8"),
)
RATIOS = (
    ("fp32", "transformers", (1, 8, 32), 1.0),
    ("fp32", "vllm", (8, 32), 0.9),
    ("int8", "vllm", (8, 32), 1.5),
    ("int8", "openvino", (8, 32), 0.85),
    ("int8", "openvino", (1,), 0.7),
    ("int8", "llama.cpp", (32,), 3.0),
)
"""Of ours in that kind, to a peer, at these concurrencies: at least so much."""
HTTP_RATIOS = (("transformers serve", 6.0), ("transformers serve, continuous", 3.0))
"""Of ours in int8, at eight at once."""
OWN = {
    "16 adapters: throughput, of the base alone": (">=", 0.7),
    "16 adapters: memory, of base + adapters": ("<=", 1.15),
    "a long prompt beside 8 chats: p95 gap, of undisturbed": ("<=", 2.0),
    "1,000 tokens just served: time to first token": ("<=", 0.25),
    "int8: likeliest token as in fp32": (">=", 0.98),
}


def main() -> int:
    asked = _arguments()
    made = serve_model.make(asked.folder / "serve")
    found: dict[str, Any] = {"rounds": []}
    pythons = {
        peer: venvs.python_of(peer, asked.folder, asked.find_links)
        for peer in venvs.PACKAGES
        if _wants_peer(peer, asked)
    }
    for number in range(asked.rounds):
        print(f"round {number + 1} of {asked.rounds}", flush=True)
        found["rounds"].append(_round(made, pythons, asked))
    found["own"] = _own(made, asked)
    report = summarise(found, asked)
    write_json(asked.json, report)
    return 0 if all(one["is_met"] for one in report["bars"]) else 1


def _wants_peer(peer: str, asked: argparse.Namespace) -> bool:
    kinds = {kind for name, kind in IN_PROCESS if name == peer} or {"http"}
    return bool(kinds & set(asked.only)) and peer not in asked.without


def _round(
    made: serve_model.Made, pythons: dict[str, str | None], asked: argparse.Namespace
) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for peer, kind in IN_PROCESS:
        if kind not in asked.only or peer in asked.without:
            continue
        python = sys.executable if peer in ("ours", "transformers") else pythons.get(peer)
        if python is None:
            continue
        script = "serve_ours.py" if peer == "ours" else "serve_peers.py"
        side = Side(script, asked.threads, python)
        try:
            for concurrency in CONCURRENCIES:
                told = side.ask(
                    what="speed",
                    peer=peer,
                    kind=kind,
                    model=str(made.model),
                    gguf=str(made.gguf),
                    concurrency=concurrency,
                    most=max(CONCURRENCIES),
                    threads=asked.threads,
                )
                _note(measured, peer, kind, concurrency, told)
        except RuntimeError as error:
            print(f"  {peer} {kind} is left out: {error}", flush=True)
        side.close()
    if "http" in asked.only:
        _over_http(measured, made, pythons.get("transformers serve"), asked)
    return measured


def _over_http(
    measured: dict[str, Any],
    made: serve_model.Made,
    python: str | None,
    asked: argparse.Namespace,
) -> None:
    commands = {"ours": (http.ours(made.model, "int8", asked.threads), "bench", 8)}
    if python is not None:
        plain = http.theirs(python, made.model, is_continuous=False)
        continuous = http.theirs(python, made.model, is_continuous=True)
        continuous += ["--cb-block-size", "32", "--cb-num-blocks", "256"]
        continuous += ["--cb-max-batch-tokens", "512"]
        commands["transformers serve"] = (plain, str(made.model), 8)
        commands["transformers serve, continuous"] = (continuous, str(made.model), 8)
    texts = [made.tokenizer.decode(ids) for ids in prompts(8)]
    for peer, (command, model, concurrency) in commands.items():
        try:
            with http.serving(command, asked.folder, asked.threads) as url:
                http.measure(url, model, texts[:1], peer)
                told = http.measure(url, model, texts[:concurrency], peer)
            _note(measured, peer, "http", concurrency, told)
        except (RuntimeError, OSError, ValueError) as error:
            print(f"  {peer} is left out: {str(error)[-500:]}", flush=True)


def _note(
    measured: dict[str, Any], peer: str, kind: str, concurrency: int, told: dict[str, Any]
) -> None:
    measured[f"{peer} {kind} {concurrency}"] = told
    print(
        f"  {peer:30} {kind:5} {concurrency:3} at once  {_rate(told):8.1f} by CPU "
        f"{told['tokens'] / told['wall']:8.1f} by wall  {told['peak_mb']:6.0f} MB",
        flush=True,
    )


def _rate(told: dict[str, Any]) -> float:
    """Tokens in two CPU seconds."""
    return float(2 * told["tokens"] / told["cpu"])


def _own(made: serve_model.Made, asked: argparse.Namespace) -> dict[str, Any]:
    """What has no peer."""
    side = Side("serve_ours.py", asked.threads)
    common = {"model": str(made.model), "threads": asked.threads}
    found: dict[str, Any] = {}
    if "lora" in asked.only:
        adapters = [str(place) for place in made.adapters]
        found["lora"] = side.ask(what="adapters", kind="int8", adapters=adapters, **common)
    if "mixed" in asked.only:
        found["mixed"] = side.ask(what="mixed", kind="int8", long=2000, steps=40, **common)
    if "prefix" in asked.only:
        found["prefix"] = side.ask(what="prefix", kind="int8", shared=1000, **common)
    if "agreement" in asked.only:
        place, rows = serve_trained.make(asked.folder / "serve", asked.threads)
        random = prompts(20, 96, seed=11)
        found["agreement"] = _agreement(side, place, rows, asked)
        found["agreement, random weights"] = _agreement(side, made.model, random, asked)
    side.close()
    return found


def _agreement(side: Side, model: Path, rows: list[list[int]], asked: argparse.Namespace) -> float:
    """Share of places where both kinds find the same token likeliest."""
    told = [
        side.ask(what="agreement", kind=kind, rows=rows, model=str(model), threads=asked.threads)[
            "likeliest"
        ]
        for kind in ("fp32", "int8")
    ]
    pairs = list(zip(*told, strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


def summarise(found: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    rounds = found["rounds"]
    names = list(rounds[0]) if rounds else []
    rows = [
        [
            name,
            f"{median(_rate(one[name]) for one in rounds if name in one):.1f}",
            f"{median(one[name]['tokens'] / one[name]['wall'] for one in rounds):.1f}",
            f"{rounds[0][name]['peak_mb']:.0f}",
        ]
        for name in names
        if all(name in one for one in rounds)
    ]
    print(f"\n{platform.processor() or platform.machine()}, {asked.threads} thread(s)")
    print(f"prompts of {PROMPT}, {NEW} new tokens\n")
    print_table(["engine, kind, at once", "tok/s by CPU", "by wall", "MB"], rows)
    print()
    figures, bars = _figures(rounds), _bars()
    own = _own_figures(found["own"])
    figures |= own
    bars |= {name: OWN[name.removesuffix(" (wall)")] for name in own}
    verdicts = judge(figures, {name: bar for name, bar in bars.items() if name in figures})
    return {**found, "threads": asked.threads, "figures": figures, "bars": verdicts}


def _figures(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """A ratio is taken within each round, and the median of the rounds counts."""
    figures = {}
    for kind, peer, concurrencies, _ in RATIOS:
        their_kind = "int8" if peer in ("openvino", "llama.cpp") else "fp32"
        for concurrency in concurrencies:
            pairs = [
                (
                    one.get(f"ours {kind} {concurrency}"),
                    one.get(f"{peer} {their_kind} {concurrency}"),
                )
                for one in rounds
            ]
            _add_ratios(figures, _ratio_name(kind, peer, concurrency), pairs)
    for peer, _ in HTTP_RATIOS:
        pairs = [(one.get("ours http 8"), one.get(f"{peer} http 8")) for one in rounds]
        _add_ratios(figures, f"int8 over HTTP, times {peer}, 8 at once", pairs)
    return figures


def _add_ratios(figures: dict[str, float], name: str, pairs: list[tuple[Any, Any]]) -> None:
    whole = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
    if whole:
        figures[name] = round(median(_rate(a) / _rate(b) for a, b in whole), 3)


def _ratio_name(kind: str, peer: str, concurrency: int) -> str:
    return f"{kind}, times {peer}, {concurrency} at once"


def _bars() -> dict[str, tuple[str, float]]:
    bars = {
        _ratio_name(kind, peer, concurrency): (">=", bar)
        for kind, peer, concurrencies, bar in RATIOS
        for concurrency in concurrencies
    }
    return bars | {
        f"int8 over HTTP, times {peer}, 8 at once": (">=", bar) for peer, bar in HTTP_RATIOS
    }


def _own_figures(own: dict[str, Any]) -> dict[str, float]:
    speed, memory, gap, prefix, agreement = OWN
    figures: dict[str, float] = {}
    if lora := own.get("lora"):
        figures[speed] = round(lora["base"]["cpu"] / lora["worn"]["cpu"], 3)
        figures[f"{speed} (wall)"] = round(lora["base"]["wall"] / lora["worn"]["wall"], 3)
        parts = lora["base_mb"] + lora["adapters_mb"]
        figures[memory] = round(lora["together_mb"] / parts, 3)
    for name, told, one, other in (
        (gap, own.get("mixed"), "beside", "alone"),
        (prefix, own.get("prefix"), "again", "first"),
    ):
        if told:
            figures[name] = round(told[one]["cpu"] / told[other]["cpu"], 3)
            figures[f"{name} (wall)"] = round(told[one]["wall"] / told[other]["wall"], 3)
    if "agreement" in own:
        figures[agreement] = round(own["agreement"], 4)
        random = own["agreement, random weights"]
        print(f"the same of random weights of 110 M: {random:.3f}")
    return figures


def _arguments() -> argparse.Namespace:
    parts = ["fp32", "int8", "http", "lora", "mixed", "prefix", "agreement"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=lambda text: text.split(","), default=parts)
    parser.add_argument("--without", type=lambda text: text.split(","), default=[])
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--find-links", action="append", default=[])
    parser.add_argument("--json", type=Path, default=Path("bench/out/serve.json"))
    asked = parser.parse_args()
    asked.folder = asked.folder.absolute()
    print(json.dumps({"threads": asked.threads, "rounds": asked.rounds, "parts": asked.only}))
    return asked


if __name__ == "__main__":
    sys.exit(main())

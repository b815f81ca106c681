"""The gate before a model's public name: what the engine says against what its trainer said.

    python -m tunesmith.infer.gate --model ARTIFACT --witnessed FOLDER

Says one line of JSON on stdout: {"verdict": …} (see `spec.parity.Verdict`), or {"unheard": why}
where the engine cannot serve such a model at all.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.parity import adapter_facts, facts_of
from tunesmith.data.render import Renderer
from tunesmith.errors import TuningAPIError, ValidationError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.hearing import Ears, Heard
from tunesmith.infer.model import base_of
from tunesmith.infer.precision import Precision
from tunesmith.infer.unlike import (
    Unlike,
    changed_fact,
    compare_rendered,
    described,
    differences,
    first_apart,
    guessed,
)
from tunesmith.infer.voices import renderer_of
from tunesmith.nn.packed import best_precision
from tunesmith.nn.sums import first_changed
from tunesmith.spec.parity import Cause, Spoken, Verdict, Witnessed, limit_of

log = logging.getLogger(__name__)
_SAME = 1e-6


class Gate:
    """Over one base: for itself, or for adapters that stand on it."""

    def __init__(self, base: Path, device: str, precision: Precision) -> None:
        """Raises BadRequestError where the engine cannot serve it."""
        self._ears = Ears(base, device, precision)

    @property
    def is_lean(self) -> bool:
        return self._ears.is_lean

    def judge(self, folder: Path, witnessed: Witnessed) -> Verdict:
        """Raises BadRequestError where the folder cannot be loaded over the base."""
        name, limit = limit_of(self._ears.format, witnessed.precision)
        tokens = sum(len(one.ids) for one in witnessed.spoken)
        worst, cause = 0.0, None
        try:
            renderer = _renderer(folder, witnessed.at)
            compare_rendered(renderer, witnessed)
            changed = first_changed(folder, witnessed.sums)
            if changed is not None:
                raise Unlike("weights", f"{changed} is not what was trained")
            worst = self._compare_speech(folder, witnessed, renderer)
            message = (
                f"served = trained: {len(witnessed.spoken)} conversations of {tokens:,} tokens "
                f"have the same ids and answers, and log-probabilities within {worst:.2g} "
                f"({name}: {limit.most:g} at most)"
            )
        except Unlike as unlike:
            cause, worst, message = unlike.cause, unlike.worst, str(unlike)
        return Verdict(
            has_passed=cause is None,
            format=name,
            conversations=len(witnessed.spoken),
            tokens=tokens,
            worst=worst,
            limit=limit.most,
            cause=cause,
            message=message[:4000],
        )

    def _compare_speech(self, folder: Path, witnessed: Witnessed, renderer: Renderer) -> float:
        """The largest difference of a log-probability. Raises Unlike."""
        spoken = witnessed.spoken
        if not spoken:
            return 0.0
        _, limit = limit_of(self._ears.format, witnessed.precision)
        with self._ears.loaded(folder) as adapter:
            heard = self._hear(adapter, spoken)
            apart = [one for row in differences(spoken, heard) for one in row]
            worst = max(apart, default=0.0)
            place = first_apart(spoken, heard, limit)
            if place is None:
                return worst
            where = described(renderer, spoken, heard, place)
            facts = (
                facts_of(self._ears.base) | adapter_facts(folder) if adapter else facts_of(folder)
            )
            fact = changed_fact(witnessed.facts, facts)
            if fact is not None:
                raise Unlike(fact[0], f"{where}; {fact[1]}", worst)
            cause: Cause = guessed(spoken, heard, limit, self._ears.format == "fp32")
            if adapter and _is_same(heard, self._hear(None, spoken)):
                cause = "adapter_missing"
            raise Unlike(cause, where, worst)

    def _hear(self, adapter: str | None, spoken: Sequence[Spoken]) -> Heard:
        rows = [list(one.ids) for one in spoken]
        questions = [list(one.question) for one in spoken]
        most = max(len(one.answer) for one in spoken)
        return self._ears.hear(adapter, rows, questions, most)


def _renderer(folder: Path, at: float) -> Renderer:
    try:
        return renderer_of(folder).at(lambda: datetime.fromtimestamp(at))
    except ValidationError as error:
        raise Unlike("tokenizer", error.message) from None


def _is_same(one: Heard, other: Heard) -> bool:
    pairs = zip(one.log_probs, other.log_probs, strict=True)
    return all(
        abs(a - b) < _SAME for left, right in pairs for a, b in zip(left, right, strict=True)
    )


def judge_all(
    model: Path, witnessed: Sequence[Witnessed], base: Path | None = None, device: str = "cpu"
) -> Verdict:
    """Of an artifact: the first that does not pass, else the last. Raises TuningAPIError."""
    base = base or (base_of(model) if is_adapter(model) else model)
    return _judged(Gate(base, device, exact_on(device)), model, witnessed)


def judge_served(model: Path, witnessed: Sequence[Witnessed], base: Path, device: str) -> Verdict:
    """Exactly, and then in the numbers that the engine has here unless told otherwise: a model that
    drifts in those is still what was trained, and it is told how to serve it."""
    gate = Gate(base, device, exact_on(device))
    exact = _judged(gate, model, witnessed)
    if not exact.has_passed or device != "cpu" or not gate.is_lean or best_precision() != "int8":
        return exact
    del gate
    served = _judged(Gate(base, device, "int8"), model, witnessed)
    told = f"in int8, as it is served here, within {served.worst:.2g}"
    if not served.has_passed:
        told = f"but in int8 it drifts by up to {served.worst:.2g}: serve it with --precision fp32"
    update = {"message": f"{exact.message}; {told}", "has_drifted": not served.has_passed}
    return exact.model_copy(update=update)


def exact_on(device: str) -> Precision:
    return "fp32" if device == "cpu" else "bf16"


def _judged(gate: Gate, model: Path, witnessed: Sequence[Witnessed]) -> Verdict:
    assert witnessed
    for one in witnessed:
        verdict = gate.judge(model / one.model, one)
        if not verdict.has_passed:
            break
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """May be called in a process forked from one that has this module imported and no threads."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level="WARNING", force=True)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    torch.set_num_threads(options.threads)
    try:
        found = [
            Witnessed.model_validate_json(place.read_bytes())
            for place in sorted(options.witnessed.glob("*.json"))
        ]
        model: Path = options.model
        base = options.base or (base_of(model) if is_adapter(model) else model)
        verdict = judge_served(model, found, base, options.device)
        said: dict[str, Any] = {"verdict": verdict.model_dump(mode="json")}
    except TuningAPIError as error:
        log.exception("the engine cannot serve it")
        said = {"unheard": error.message[:2000]}
    with out:
        out.write(json.dumps(said, ensure_ascii=False) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunesmith.infer.gate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--witnessed", type=Path, required=True)
    parser.add_argument(
        "--base", type=Path, help="where an adapter's base is, if not where it says"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())

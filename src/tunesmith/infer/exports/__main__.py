"""A model in another format, in a process of its own.

    python -m tunesmith.infer.exports --model PATH --out PATH --format safetensors|gguf [--type f16]

Says lines of JSON on stdout: {"type": "progress", "what", "done", "total"}, and at the end
{"type": "done", "verdict"} or {"type": "failed", "message"}.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tunesmith.errors import BadRequestError, JobFailure, TuningAPIError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.exports import checking, gguf_file, llamacpp, merge
from tunesmith.infer.exports.asking import asked
from tunesmith.spec.parity import Verdict

log = logging.getLogger(__name__)
Tell = Callable[[str, int, int], None]


def export(model: Path, out: Path, format: str, kind: gguf_file.Kind, tell: Tell) -> Verdict | None:
    """The verdict on it; None where nothing here can read a GGUF file as llama.cpp does.

    An export that does not pass leaves nothing. Raises BadRequestError.
    """
    if out.exists():
        raise BadRequestError(f"{out} is there already; give a place that is free")
    out.parent.mkdir(parents=True, exist_ok=True)
    tell("listening to the model", 0, 0)
    witnessed = asked(model)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        whole = Path(place) / "model"
        if format == "safetensors":
            tell("writing safetensors", 0, 0)
            held = merge.save(model, whole)
            tell("comparing", 0, 0)
            verdict: Verdict | None = checking.check_folder(whole, witnessed, held)
            made = whole
        else:
            made = Path(place) / out.name
            verdict = _gguf(model, whole, made, witnessed, kind, tell)
        if verdict is not None and not verdict.has_passed:
            raise BadRequestError(f"the export was not kept: {verdict.message}")
        os.rename(made, out)
    return verdict


def _gguf(
    model: Path, whole: Path, made: Path, witnessed: Any, kind: gguf_file.Kind, tell: Tell
) -> Verdict | None:
    source = model
    if is_adapter(model):
        tell("merging the adapter", 0, 0)
        merge.save(model, whole)
        source = whole
    gguf_file.write(source, made, kind, lambda done, total: tell("writing GGUF", done, total))
    if not llamacpp.is_installed():
        return None
    tell("comparing with llama.cpp", 0, 0)
    return checking.check_gguf(made, source, witnessed, kind, torch.get_num_threads())


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    logging.basicConfig(level="WARNING", force=True)
    transformers.utils.logging.disable_progress_bar()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(**said: Any) -> None:
        with contextlib.suppress(OSError):
            out.write(json.dumps(said, ensure_ascii=False) + "\n")
            out.flush()

    def tell(what: str, done: int, total: int) -> None:
        say(type="progress", what=what, done=done, total=total)

    try:
        verdict = export(options.model, options.out, options.format, options.type, tell)
    except (TuningAPIError, JobFailure, OSError, MemoryError) as error:
        say(type="failed", message=str(error)[:4000] or type(error).__name__)
        return 1
    say(type="done", verdict=None if verdict is None else verdict.model_dump(mode="json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunesmith.infer.exports")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--format", choices=("safetensors", "gguf"), default="safetensors")
    parser.add_argument("--type", choices=("f32", "f16", "q8_0"), default="f16")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # llama.cpp's server has threads that nobody can end

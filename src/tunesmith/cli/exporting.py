"""`models merge` and `models export`: a model in another format, compared with what it was."""

import json
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.place import KeyOption, ServerOption, WorkspaceOption
from tunesmith.cli.registry import office
from tunesmith.cli.terminal import CommandError, show, suggest, tell
from tunesmith.cli.text import is_terminal

SourceArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="ft:…, a checkpoint, a registered name or a folder.")
]
OutArgument = Annotated[Path, typer.Argument(help="A place that is free.")]


class Format(StrEnum):
    SAFETENSORS = "safetensors"
    GGUF = "gguf"


class Kind(StrEnum):
    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


def merge(
    name: SourceArgument,
    out: OutArgument,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Lay an adapter into its base: one folder that plain transformers loads."""
    with office(server, api_key, workspace) as place:
        source = place.model(name)
    _run(source, out, Format.SAFETENSORS, Kind.F32)
    suggest(f"tunesmith models add NAME {out}")


def export(
    name: SourceArgument,
    out: OutArgument,
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.SAFETENSORS,
    kind: Annotated[
        Kind | None, typer.Option("--type", help="Of the numbers in a GGUF file; f16 if not said.")
    ] = None,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write a model as safetensors, or as a GGUF file that llama.cpp loads. It is compared with
    the model that it was made of, and kept only where both say the same."""
    if kind is not None and format is not Format.GGUF:
        raise CommandError("--type goes with --format gguf", code=2)
    with office(server, api_key, workspace) as place:
        source = place.model(name)
    _run(source, out, format, kind or Kind.F16)


def _run(source: str, out: Path, format: Format, kind: Kind) -> None:
    """Raises CommandError."""
    if not Path(source).is_dir():
        raise CommandError(f"{source} is not on this machine", "export where the model is served")
    command = [sys.executable, "-m", "tunesmith.infer.exports", "--model", source]
    command += ["--out", str(out.expanduser().absolute()), "--format", format, "--type", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        said = _follow(child.stdout)
        complaint = child.stderr.read().decode(errors="replace")
    if said.get("type") != "done":
        raise CommandError(str(said.get("message") or _last_line(complaint)))
    verdict = said["verdict"]
    if verdict is None:
        tell("not compared with llama.cpp: pip install 'tunesmith[llamacpp]' to have that done")
    else:
        tell(verdict["message"])
    show(str(out))


def _follow(lines: Any) -> dict[str, Any]:
    """Tell how far it is; returns its last word."""
    said: dict[str, Any] = {}
    told, shows_all = "", is_terminal(sys.stderr)
    for line in lines:
        said = json.loads(line)
        if said["type"] != "progress":
            break
        share = f" {said['done']}/{said['total']}" if said["total"] else ""
        if shows_all:
            print(f"\r\x1b[K{said['what']}{share}", end="", file=sys.stderr, flush=True)
        elif said["what"] != told:
            told = said["what"]
            tell(told)
    if shows_all:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return said


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "the export ended without a word")

"""The command line: `tunesmith …`. Heavy imports wait inside the commands."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tunesmith.cli import backup, chat, check, data, doctor, exporting, jobs, registry, serve, train
from tunesmith.cli.terminal import FAILED, INTERRUPTED, CommandError, explain

__all__ = ["app", "main"]


def _version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"tunesmith {version('tunesmith')}")
        raise typer.Exit


app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A fine-tuning service that a team runs on its own machines.",
)


@app.callback()
def _start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole trace of an error.")
    ] = False,
) -> None:
    global _is_debugging
    _is_debugging = debug


_is_debugging = False

app.command()(serve.up)
app.command()(serve.api)
app.command()(serve.worker)
app.command()(serve.serve)
app.add_typer(train.train, name="train")
app.add_typer(jobs.jobs, name="jobs")
app.command()(jobs.logs)
app.command()(jobs.cancel)
app.command()(chat.chat)
app.command()(check.check)
registry.models.command()(exporting.merge)
registry.models.command()(exporting.export)
app.add_typer(registry.models, name="models")
registry.data.command()(data.check)
registry.data.command()(data.preview)
app.add_typer(registry.data, name="data")
app.add_typer(registry.keys, name="keys")
app.command()(doctor.doctor)
app.command()(backup.backup)
app.command()(backup.restore)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 ok, 1 failed, 2 usage, 3 not found, 4 key,
    5 job failed, 130 interrupted."""
    from tuning_sdk.errors import TuningAPIError

    _write_any_text()
    try:
        return _run(arguments)
    except (CommandError, TuningAPIError, FileNotFoundError) as error:
        if _is_debugging:
            raise
        return explain(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return FAILED
    except OSError as error:
        if _is_debugging:
            raise
        return explain(error)


def _run(arguments: Sequence[str] | None) -> int:
    """Typer's own way with errors is a box; ours is a line and a hint."""
    try:
        code = app(args=arguments, prog_name="tunesmith", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except typer.TyperException as error:
        return _explain_usage(error)
    return code if isinstance(code, int) else 0


def _explain_usage(error: typer.TyperException) -> int:
    told, context = error.format_message(), getattr(error, "ctx", None)
    if type(error).__name__ != "NoArgsIsHelpError":
        told = " ".join(told.split()).rstrip(".")
        command = context.command_path if context is not None else "tunesmith"
        return explain(CommandError(told, f"{command} --help", error.exit_code))
    print(told, file=sys.stderr)
    return error.exit_code


def _write_any_text() -> None:
    """A terminal that cannot show a character gets a question mark, not a crash."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _forget_stdout() -> None:
    """The reader is gone: keep the interpreter's last flush from complaining."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

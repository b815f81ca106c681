"""`tunesmith backup` and `restore`: on the workspace's own machine, with its server up or not."""

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.place import JsonOption, WorkspaceOption, settings_for
from tunesmith.cli.terminal import show, show_json, suggest, tell


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DEST", help="A new or empty folder.")],
    with_models: Annotated[
        bool,
        typer.Option("--with-models", help="Trained models, checkpoints and logs too."),
    ] = False,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the workspace's jobs, data and keys to a folder; its server may go on."""
    from tunesmith.hub import backup as backups

    made = backups.back_up(
        settings_for(workspace), folder.absolute(), with_models=with_models, tell=tell
    )
    for line in made.left_out:
        tell(f"left out: {line}")
    if as_json:
        show_json(backups.summary(made))
    else:
        show(f"{made.folder}: {made.files} files, {made.size_bytes / 1e6:,.1f} MB")
    suggest(f"tunesmith restore {made.folder} --workspace DIR", "to restore it")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="SRC", help="A backup.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build a workspace from a backup. Jobs that ran are queued again."""
    from tunesmith.hub.restore import restore as build

    done = build(folder.absolute(), settings_for(workspace), tell)
    if as_json:
        show_json(
            {
                "workspace": str(done.workspace),
                "files": done.files,
                "queued_again": done.queued_again,
            }
        )
    else:
        again = f"; {len(done.queued_again)} jobs are queued again" if done.queued_again else ""
        show(f"{done.workspace}: {done.files} files restored{again}")
    suggest(f"tunesmith up --workspace {done.workspace}", "to start it")

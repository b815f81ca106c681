"""Starting things: `up`, `api`, `worker`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.cli.place import WorkspaceOption, settings_for
from tunesmith.cli.terminal import USAGE, CommandError

HostOption = Annotated[
    str | None, typer.Option("--host", help="Where to listen (default 127.0.0.1).")
]
PortOption = Annotated[
    int | None,
    typer.Option("--port", min=0, max=65535, help="The port (default 8000; 0: a free one)."),
]
ReloadOption = Annotated[
    bool, typer.Option("--reload", help="Start anew when the source changes; for development.")
]


def up(
    host: HostOption = None,
    port: PortOption = None,
    reload: ReloadOption = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Start everything on this machine: API, worker, engines. Ctrl-C stops it all."""
    _serve("all", True, host, port, reload, workspace)


def api(
    role: Annotated[
        Literal["training", "all"], typer.Option(help="Which of the contracts to answer.")
    ] = "all",
    host: HostOption = None,
    port: PortOption = None,
    reload: ReloadOption = False,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Start no worker; one comes from elsewhere.")
    ] = False,
    bell: Annotated[
        Literal["poll", "celery", "ray"], typer.Option(help="What wakes the workers.")
    ] = "poll",
    workspace: WorkspaceOption = None,
) -> None:
    """Start the API, with one worker beside it."""
    if bell != "poll":
        raise CommandError(
            f"this version has no {bell} bell yet",
            "leave --bell out: workers ask by themselves",
            USAGE,
        )
    _serve(role, not no_worker, host, port, reload, workspace)


def worker(
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="URL", help="The API (default: the workspace's own)."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="TUNESMITH_WORKER_TOKEN", help="The worker's token."),
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Start this host's worker: it claims jobs and runs their trainers."""
    settings = settings_for(workspace)
    run = _needs_server_extra("tunesmith.work.worker")
    raise typer.Exit(run(settings, server=server, token=token))


def _serve(
    role: str,
    should_start_worker: bool,
    host: str | None,
    port: int | None,
    reload: bool,
    workspace: Path | None,
) -> None:
    settings = settings_for(workspace, host=host, port=port)
    if not settings.workspace.is_dir():
        raise CommandError(
            f"the workspace {str(settings.workspace)!r} is no folder", "make it first", USAGE
        )
    run = _needs_server_extra("tunesmith.api.serve")
    raise typer.Exit(
        run(settings, role=role, should_start_worker=should_start_worker, reload=reload)
    )


def _needs_server_extra(module: str):  # type: ignore[no-untyped-def]
    from importlib import import_module

    try:
        return import_module(module).run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "tunesmith":
            raise
        raise CommandError(
            f"{error.name} is not installed", "pip install 'tunesmith[server]'"
        ) from None

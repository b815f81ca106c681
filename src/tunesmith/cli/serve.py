"""Starting things: `up`, `api`, `worker`, `serve`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith.cli.place import WorkspaceOption, settings_for
from tunesmith.cli.terminal import NOT_FOUND, USAGE, CommandError, tell

if TYPE_CHECKING:
    from tunesmith.settings import Settings

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
        Literal["poll", "celery", "ray"] | None,
        typer.Option(
            envvar="TUNESMITH_BELL",
            help="What wakes the workers: they ask (poll, with a worker started beside the API), "
            "rings by Redis (celery), or tasks of a Ray cluster (ray).",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Start the API, with one worker beside it, unless a bell brings workers from elsewhere."""
    _serve(role, not no_worker, host, port, reload, workspace, bell)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="The model's folder, or an adapter's (MODEL_PATH)."),
    ] = None,
    host: HostOption = None,
    port: PortOption = None,
    load_in_8bit: Annotated[
        bool | None, typer.Option("--load-in-8bit", help="Keep the weights in 8 bits.")
    ] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit", help="Keep the weights in 4 bits.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="FILE",
            help="Keys that may ask, as `tunesmith keys create --file FILE` adds them "
            "(default: nobody needs one).",
        ),
    ] = None,
    reload: ReloadOption = False,
) -> None:
    """Serve one model by itself, without jobs: /generate, /chat, and OpenAI's routes.

    Without PATH it starts without a model; POST /load_model loads one.
    """
    settings = settings_for(
        host=host,
        port=port,
        model_path=model,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        api_keys_file=keys,
    )
    if model is not None and not Path(model).expanduser().is_dir():
        raise CommandError(f"no model folder at {model!r}", "give the folder's path", NOT_FOUND)
    if settings.load_in_8bit and settings.load_in_4bit:
        raise CommandError("8-bit and 4-bit weights exclude each other", "choose one", USAGE)
    run = _needs_server_extra("tunesmith.infer.standalone", "serve")
    raise typer.Exit(run(settings, reload=reload))


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
    """Start this host's worker: it claims jobs and runs their trainers.

    On a host that does not see the API's folder it needs a key (`tunesmith keys create --worker`);
    then --workspace is a folder of its own, for what it fetches and makes.
    """
    settings = settings_for(workspace)
    run = _needs_server_extra("tunesmith.work.worker")
    if server is not None:
        _introduce(server, token, settings)
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    raise typer.Exit(run(settings, server=server, token=token))


def _introduce(server: str, token: str | None, settings: "Settings") -> None:
    """A first word with the API: what can't get better by waiting is said now."""
    from tunesmith.work.first_word import Refused, first_word

    if not token:
        raise CommandError(
            "a worker of another host shows the API a key",
            "make one where the API is (tunesmith keys create --worker), then --token KEY, or "
            "TUNESMITH_WORKER_TOKEN",
            USAGE,
        )
    try:
        trouble = first_word(server, token, settings.ca_bundle)
    except Refused as refusal:
        raise CommandError(str(refusal), refusal.advice) from None
    if trouble:
        tell(f"{server} does not answer ({trouble}); this worker goes on trying, Ctrl-C ends it")
    else:
        tell(f"this worker works for {server}; its own files are in {settings.home}")


def _serve(
    role: str,
    should_start_worker: bool,
    host: str | None,
    port: int | None,
    reload: bool,
    workspace: Path | None,
    bell: str | None = "poll",
) -> None:
    settings = settings_for(workspace, host=host, port=port, bell=bell)
    if not settings.workspace.is_dir():
        raise CommandError(
            f"the workspace {str(settings.workspace)!r} is no folder", "make it first", USAGE
        )
    run = _needs_server_extra("tunesmith.api.serve")
    raise typer.Exit(
        run(settings, role=role, should_start_worker=should_start_worker, reload=reload)
    )


def _needs_server_extra(module: str, extra: str = "server"):  # type: ignore[no-untyped-def]
    from importlib import import_module

    try:
        return import_module(module).run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "tunesmith":
            raise
        raise CommandError(
            f"{error.name} is not installed", f"pip install 'tunesmith[{extra}]'"
        ) from None

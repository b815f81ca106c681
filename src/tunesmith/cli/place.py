"""Where a command finds its server, and with which key it speaks.

What is asked for wins: --server and --api-key, then TUNESMITH_BASE_URL and TUNESMITH_API_KEY,
then the workspace's own server (`.tunesmith/api.json`) with the workspace's own token. The token
goes to that server only.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import CommandError

if TYPE_CHECKING:
    from tunesmith.settings import Settings
    from tuning_sdk import TuningClient

ServerOption = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="The server to speak to.")
]
KeyOption = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="The key to send.")]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option("--workspace", metavar="DIR", help="The workspace (default: this folder)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_MAX_NOTE_BYTES = 10_000


@dataclass(frozen=True)
class Place:
    url: str
    key: str | None
    is_own: bool
    """Whether it is the workspace's own server, reached with its token."""


def settings_for(workspace: Path | None = None, **over: Any) -> "Settings":
    """The environment's settings with options on top. Raises CommandError."""
    from pydantic import ValidationError

    from tunesmith.settings import Settings

    try:
        return Settings.read(workspace=workspace, **over)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise CommandError(f"setting {name}: {fault['msg']}", code=2) from None


def find(server: str | None, api_key: str | None, workspace: Path | None = None) -> Place:
    """Raises CommandError where no server is named and none of the workspace runs."""
    settings = settings_for(workspace)
    key = api_key or settings.api_key or None
    url = server or settings.base_url
    if url:
        return Place(url, key, False)
    own = own_server(home_of(settings, workspace))
    if own is not None:
        return Place(own.url, key or own.key, key is None)
    if answers("127.0.0.1", 8000):
        return Place("http://127.0.0.1:8000", key, False)
    raise CommandError(
        f"no server runs in {settings.workspace.resolve()}",
        "start one with `tunesmith up`, or name one with --server URL",
    )


def operator_place(server: str | None, api_key: str | None, workspace: Path | None) -> Place | None:
    """Where the operator's routes are: the workspace's token goes first. None: no server runs."""
    settings = settings_for(workspace)
    if server:
        return Place(server, api_key or settings.api_key or None, False)
    own = own_server(home_of(settings, workspace))
    if own is not None:
        return Place(own.url, api_key or own.key, api_key is None)
    if settings.base_url:
        return Place(settings.base_url, api_key or settings.api_key or None, False)
    return None


def home_of(settings: "Settings", workspace: Path | None) -> Path:
    """The workspace's `.tunesmith`: where it was named, else here or in a folder above."""
    if workspace is not None or "workspace" in settings.model_fields_set:
        return settings.home
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".tunesmith" / "api.json").is_file():
            return folder / ".tunesmith"
    return settings.home


def own_server(home: Path) -> Place | None:
    """The running server of a workspace, from what it wrote down; None where none runs."""
    if not _is_ours(home):
        return None
    try:
        note = json.loads((home / "api.json").read_bytes()[:_MAX_NOTE_BYTES])
        url, pid = str(note["url"]), int(note["pid"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not _is_alive(pid):
        return None
    try:
        token = (home / "worker.token").read_text("utf-8").strip()
    except (OSError, ValueError):
        token = ""
    return Place(url, token or None, True)


@contextmanager
def client_for(
    server: str | None, api_key: str | None, workspace: Path | None = None
) -> Iterator["TuningClient"]:
    with opened(find(server, api_key, workspace)) as client:
        yield client


@contextmanager
def opened(place: Place) -> Iterator["TuningClient"]:
    from tuning_sdk import TuningClient

    try:
        client = TuningClient(api_key=place.key or "", base_url=place.url)
    except ValueError as error:
        raise CommandError(str(error), code=2) from None
    with client:
        yield client


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    import socket

    try:
        with socket.create_connection((host, port), timeout=0.3):
            return True
    except OSError:
        return False


def _is_ours(home: Path) -> bool:
    """Whether this user made the folder: another's note is no reason to trust its address."""
    try:
        owner = home.stat().st_uid
    except OSError:
        return False
    return not hasattr(os, "getuid") or owner == os.getuid()


def _is_alive(pid: int) -> bool:
    if os.name == "nt" or pid <= 0:
        return pid > 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

"""The operator's names and keys: beside a running server through it, else in the workspace."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import quote

import typer

from tunesmith.cli.near import names_in, near_name
from tunesmith.cli.place import (
    JsonOption,
    KeyOption,
    ServerOption,
    WorkspaceOption,
    opened,
    operator_place,
    settings_for,
)
from tunesmith.cli.terminal import (
    NOT_FOUND,
    USAGE,
    CommandError,
    show,
    show_json,
    show_rows,
    suggest,
    tell,
)
from tunesmith.spec.scopes import SCOPES

models = typer.Typer(no_args_is_help=True, help="Names of local models.")
data = typer.Typer(no_args_is_help=True, help="Data sets: checked, shown, given names.")
keys = typer.Typer(no_args_is_help=True, help="Keys that callers send.")

NameArgument = Annotated[str, typer.Argument(help="The name; slashes are allowed.")]


class Office(Protocol):
    """Where names and keys are kept."""

    def add(self, kind: str, name: str, path: str) -> dict[str, Any]: ...
    def names(self, kind: str) -> list[dict[str, Any]]: ...
    def model(self, name: str) -> str: ...
    def forget(self, kind: str, name: str) -> None: ...
    def make_key(self, wanted: dict[str, Any]) -> dict[str, Any]: ...
    def list_keys(self) -> list[dict[str, Any]]: ...
    def revoke_key(self, key_id: str) -> None: ...


@models.command("add")
def add_model(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(help="The model's folder.")],
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a local model folder a name that every request can use."""
    full = _existing(path)
    with office(server, api_key, workspace) as place:
        _added(place.add("models", name, full), name, as_json)
    suggest(f"tunesmith train sft --model {name} --dataset data/train.jsonl --wait")


@models.command("ls")
def list_models(
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the names of models."""
    with office(server, api_key, workspace) as place:
        _listed(place.names("models"), as_json)


@models.command("rm")
def remove_model(
    name: NameArgument,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Forget a name; the folder stays."""
    with office(server, api_key, workspace) as place:
        _forget(place, "models", name)


@data.command("add")
def add_data(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(help="The file.")],
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a local data set a name that every request can use."""
    full = _existing(path)
    with office(server, api_key, workspace) as place:
        _added(place.add("data", name, full), name, as_json)
    suggest(f"tunesmith train sft --model MODEL --dataset {name} --wait")


@data.command("ls")
def list_data(
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the names of data sets."""
    with office(server, api_key, workspace) as place:
        _listed(place.names("data"), as_json)


@data.command("rm")
def remove_data(
    name: NameArgument,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Forget a name; the file stays."""
    with office(server, api_key, workspace) as place:
        _forget(place, "data", name)


@keys.command("create")
@keys.command("make", hidden=True)
def make_key(
    owner: Annotated[str, typer.Option(help="Whose jobs the key sees.")] = "operator",
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    is_worker: Annotated[
        bool, typer.Option("--worker", help="For hosts that train: it opens nothing else.")
    ] = False,
    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", help="What it opens: train, infer, load (default: all). May be repeated."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Add its hash to this file, for `tunesmith serve --keys`; no server is asked."
        ),
    ] = None,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown this once; from the first one on, every route wants a key."""
    _refuse_unknown(scopes or [])
    if file is not None:
        show(_into_file(file, scopes, label))
        tell(f"Keep it now: it is not shown again. {str(file)!r} holds its hash.")
        return
    wanted = {"owner": owner, "label": label, "is_worker": is_worker}
    with office(server, api_key, workspace) as place:
        made = place.make_key(wanted | ({"scopes": scopes} if scopes else {}))
    if as_json:
        show_json(made)
        return
    show(str(made["key"]))
    if is_worker:
        tell("Keep it now: it is not shown again.")
        suggest("on the other host: tunesmith worker --server URL --token sk-…")
        return
    tell("Keep it now: it is not shown again. Every request wants a key from here on.")
    suggest("export TUNESMITH_API_KEY=sk-…")


def _refuse_unknown(scopes: list[str]) -> None:
    for each in scopes:
        if each not in SCOPES:
            told = near_name(each, SCOPES) or f"; there are {', '.join(SCOPES)}"
            raise CommandError(f"no scope {each!r}{told}", code=USAGE)


def _into_file(file: Path, scopes: list[str] | None, label: str) -> str:
    """A new key, of which the file keeps the hash."""
    import hashlib
    import secrets

    key = "sk-" + secrets.token_urlsafe(32)
    line = hashlib.sha256(key.encode()).hexdigest()
    line += " " + ",".join(scopes) if scopes else ""
    line += "  # " + " ".join(label.split()) if label else ""
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
    return key


@keys.command("ls")
def list_keys(
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys that were made, without the keys themselves."""
    with office(server, api_key, workspace) as place:
        found = place.list_keys()
    if as_json:
        show_json(found)
    else:
        _rows(found)


@keys.command("rm")
def remove_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys ls` shows it.")],
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Revoke a key at once."""
    with office(server, api_key, workspace) as place:
        place.revoke_key(key_id)
    tell(f"key {key_id} is revoked")


@contextmanager
def office(server: str | None, api_key: str | None, workspace: Path | None) -> Iterator[Office]:
    """The running server's operator routes, or the workspace itself where none runs."""
    place = operator_place(server, api_key, workspace)
    if place is not None:
        with opened(place) as client:
            yield _Remote(client)
        return
    try:
        from tunesmith.hub import Hub
    except ModuleNotFoundError as error:
        raise CommandError(
            f"no server runs here, and {error.name} is not installed",
            "name a server with --server URL, or pip install 'tunesmith[server]'",
        ) from None
    with Hub.open(settings_for(workspace)) as hub:
        yield _Local(hub)


class _Remote:
    def __init__(self, client: Any) -> None:
        self._transport = client.transport

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        from tuning_sdk.retry import Call

        return self._transport.send(Call(method, f"/internal/v1/{path}", json=body))

    def add(self, kind: str, name: str, path: str) -> dict[str, Any]:
        return dict(self._ask("POST", kind, {"name": name, "path": path}) or {})

    def names(self, kind: str) -> list[dict[str, Any]]:
        return list(self._ask("GET", kind))

    def model(self, name: str) -> str:
        return str(self._ask("GET", f"places/{quote(name, safe='')}")["path"])

    def forget(self, kind: str, name: str) -> None:
        self._ask("DELETE", f"{kind}/{quote(name, safe='')}")

    def make_key(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return dict(self._ask("POST", "keys", wanted))

    def list_keys(self) -> list[dict[str, Any]]:
        return list(self._ask("GET", "keys"))

    def revoke_key(self, key_id: str) -> None:
        self._ask("DELETE", f"keys/{quote(key_id, safe='')}")


class _Local:
    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def add(self, kind: str, name: str, path: str) -> dict[str, Any]:
        register = self._hub.register_model if kind == "models" else self._hub.register_data
        return dict(register(name, path) or {})

    def names(self, kind: str) -> list[dict[str, Any]]:
        return list(self._hub.names(kind))

    def model(self, name: str) -> str:
        return str(self._hub.place_of(name))

    def forget(self, kind: str, name: str) -> None:
        self._hub.forget(kind, name)

    def make_key(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return dict(self._hub.make_key(**wanted))

    def list_keys(self) -> list[dict[str, Any]]:
        return list(self._hub.list_keys())

    def revoke_key(self, key_id: str) -> None:
        self._hub.revoke_key(key_id)


def _existing(path: Path) -> str:
    """Absolute. Raises CommandError."""
    full = path.expanduser().absolute()
    if full.exists():
        return str(full)
    near = near_name(full.name, names_in(full.parent))
    raise CommandError(f"nothing lies at {str(path)!r}{near}", code=NOT_FOUND)


def _forget(place: Office, kind: str, name: str) -> None:
    from tunesmith.errors import NotFoundError

    try:
        place.forget(kind, name)
    except NotFoundError as error:
        known = [str(entry.get("name", "")) for entry in place.names(kind)]
        raise CommandError(f"{error}{near_name(name, known)}", code=NOT_FOUND) from None
    tell(f"{name!r} is forgotten; the files stay")


def _added(entry: dict[str, Any], name: str, as_json: bool) -> None:
    if as_json:
        show_json(entry)
    else:
        tell(f"{name!r} is known now")


def _listed(entries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        show_json(entries)
    else:
        _rows(entries)


def _rows(entries: list[dict[str, Any]]) -> None:
    headers = list(entries[0]) if entries else []
    if headers:
        rows = [[_cell(name, entry.get(name)) for name in headers] for entry in entries]
        show_rows(rows, [name.removeprefix("is_").removesuffix("_at").upper() for name in headers])
    else:
        tell("none yet")


def _cell(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(value)
    if name.endswith("_at") and isinstance(value, int | float):
        from datetime import UTC, datetime

        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return value

"""The application in this process, over a workspace with a tiny model: no worker, no trainer."""

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from house import chats
from train_fixtures import make_model, write_rows
from tunesmith.api.app import create_app
from tunesmith.hub import Hub
from tunesmith.settings import Settings

LOCAL = "http://127.0.0.1:8000"
ONE, TWO = {"X-API-Key": "test-key-001"}, {"X-API-Key": "test-key-002"}
ROW = b'{"prompt": "a", "completion": "b"}\n'
ASKED = {"model_name": "models/tiny", "dataset_path": "data/chat.jsonl"}


def make_workspace(place: Path) -> Path:
    make_model(place / "models" / "tiny")
    (place / "data").mkdir()
    write_rows(place / "data" / "chat.jsonl", chats(8))
    return place


@contextlib.contextmanager
def open_door(workspace: Path, peer: str = "127.0.0.1", **over: Any) -> Iterator[TestClient]:
    """A client at this machine, or at `peer`."""
    settings = Settings.read({}, workspace=workspace, **over)
    with Hub.open(settings) as hub:
        app = create_app(hub)
        door = TestClient(
            app, LOCAL, client=(peer, 5000), raise_server_exceptions=False, follow_redirects=False
        )
        with door:
            yield door


def hub_of(door: TestClient) -> Hub:
    hub: Hub = door.app.state.hub  # type: ignore[attr-defined]
    return hub


def routes_of(routes: Any) -> Iterator[APIRoute]:
    """Every route of an application, those of included routers too."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes_of(inner.routes)
        elif isinstance(route, APIRoute):
            yield route


def copy_model(workspace: Path, name: str, **config: Any) -> Path:
    """A copy of the tiny model whose configuration says something else."""
    place = workspace / "models" / name
    shutil.copytree(workspace / "models" / "tiny", place)
    if config:
        body = json.loads((place / "config.json").read_bytes())
        (place / "config.json").write_text(json.dumps(body | config))
    return place


def safetensors(header: bytes, body: bytes = b"0000") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def make_adapter(place: Path, base: str) -> Path:
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (place / "adapter_model.safetensors").write_bytes(safetensors(b"{}"))
    return place

"""The engine without an API before it: `tunesmith serve`, or any ASGI server.

    MODEL_PATH=… uvicorn tunesmith.infer.server:app
    gunicorn -w 2 -k uvicorn_worker.UvicornWorker tunesmith.infer.server:app

Nothing is read before the server starts; then each of its processes loads the model that they all
agree on (`fellows`). Settings come from the environment and `.env`.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import torch
import transformers
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith import journal
from tunesmith.errors import BadRequestError, TuningAPIError
from tunesmith.infer.app import make_app
from tunesmith.infer.fellows import Fellows
from tunesmith.infer.house import House
from tunesmith.infer.keyring import Keyring
from tunesmith.infer.loading import Loader, Wanted
from tunesmith.infer.meeting import meeting_place
from tunesmith.settings import Settings

log = logging.getLogger(__name__)
APP = "tunesmith.infer.server:app"


class Standalone:
    """Needs a server that speaks ASGI's lifespan protocol, as they all do."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        assert self._app is not None, "the server did not announce its start (lifespan)"
        await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            settings = self._settings or Settings.read()
            _log_by(settings)
            house = House(None, _loader(settings), _keyring(settings), settings.max_chat_bytes)
            async with _opened(house, _wanted(settings), settings.runtime_dir):
                app = self._app = make_app(house, settings, is_public=True)
                await app(scope, receive, send)
        except (TuningAPIError, ValueError, OSError) as refusal:  # ValueError: of settings
            log.error("the engine cannot start: %s", refusal)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(refusal)})


@contextlib.asynccontextmanager
async def _opened(
    house: House, wanted: Wanted | None, runtime_dir: Path | None
) -> AsyncIterator[None]:
    """With its first model loaded: its own, or what the processes of this server agreed on."""
    folder = meeting_place(runtime_dir)
    if folder is not None:
        async with Fellows(house, folder).joined(wanted):
            yield
        return
    if wanted is not None:
        house.put(await house.prepare(wanted))
    yield


def run(settings: Settings, reload: bool = False) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    options: dict[str, object] = {
        "host": settings.host,
        "port": settings.port,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": int(settings.drain_seconds) + 6,
    }
    if reload:  # in children that are started anew: they read the environment
        os.environ.update(_as_environment(settings))
        options["reload"] = True
        options["reload_dirs"] = [str(Path(__file__).resolve().parents[1])]
        uvicorn.run(APP, **options)  # type: ignore[arg-type]
        return 0
    server = _Server(uvicorn.Config(Standalone(settings), **options))  # type: ignore[arg-type]
    try:
        server.run()
    except KeyboardInterrupt:
        return 130
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Says where it is, once it answers."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.servers and not self.should_exit:
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"Tunesmith serves at {url}  (docs: {url}/docs)", file=sys.stderr, flush=True)


def _as_environment(settings: Settings) -> Mapping[str, str]:
    told = {"model_path": settings.model_path, "host": settings.host}
    told |= {"load_in_8bit": str(settings.load_in_8bit), "load_in_4bit": str(settings.load_in_4bit)}
    return {f"TUNESMITH_{name.upper()}": value for name, value in told.items()}


def _wanted(settings: Settings) -> Wanted | None:
    """Raises BadRequestError."""
    if settings.load_in_8bit and settings.load_in_4bit:
        raise BadRequestError("LOAD_IN_8BIT and LOAD_IN_4BIT exclude each other; choose one")
    if not settings.model_path:
        return None
    path = Path(settings.model_path).expanduser().resolve()
    return Wanted(path, path.name, settings.precision)


def _loader(settings: Settings) -> Loader:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(settings.slots)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Loader(device, settings.slots, reserve_bytes=settings.memory_reserve_bytes)


def _keyring(settings: Settings) -> Keyring:
    keyring = Keyring(file=settings.api_keys_file)
    if keyring.is_open:
        log.warning(
            "no key is wanted: whoever reaches this address may use it; "
            "TUNESMITH_API_KEYS_FILE names a file of keys' hashes (tunesmith keys create --file)"
        )
    return keyring


def _log_by(settings: Settings) -> None:
    """Our own lines; a server's own logging is left as it is."""
    ours = logging.getLogger("tunesmith")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(journal.formatter(settings.log_format))
        ours.addHandler(handler)
        ours.setLevel(settings.log_level)
        ours.propagate = False

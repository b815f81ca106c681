"""The server as a process: its port, its log, its address file, and the worker beside it."""

import asyncio
import contextlib
import json
import logging
import logging.handlers
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from tunesmith.api.app import create_app
from tunesmith.errors import BadRequestError, ConflictError, TuningAPIError
from tunesmith.hub import Hub
from tunesmith.hub.principal import is_loopback
from tunesmith.manifest import write_durably
from tunesmith.settings import Settings
from tunesmith.store import keys
from tunesmith.work import worker
from tunesmith.work.wire import pid_space

log = logging.getLogger(__name__)

EXIT_REFUSED = 78
WORKER_STOP_SECONDS = 40
_SETTINGS_PREFIX = "TUNESMITH_"
_SHARED = (
    "workspace",
    "cpu_slots",
    "memory_reserve_bytes",
    "heartbeat_seconds",
    "max_log_bytes",
    "should_fork_trainers",
    "log_level",
)


def run(
    settings: Settings,
    role: str = "all",
    should_start_worker: bool = True,
    reload: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 78 where the start is refused."""
    if reload:
        return _reload(settings, role, should_start_worker)
    _log_to_file(settings)
    try:
        with _bind(settings) as listener, Hub.open(settings) as hub:
            _refuse_open_doors(settings, hub)
            return asyncio.run(_serve(hub, listener, role, should_start_worker))
    except TuningAPIError as refusal:
        print(f"tunesmith: {refusal.message}", file=sys.stderr)
        return EXIT_REFUSED


async def _serve(hub: Hub, listener: socket.socket, role: str, should_start_worker: bool) -> int:
    settings = hub.settings
    config = uvicorn.Config(
        create_app(hub, role),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)
    app: FastAPI = config.app  # type: ignore[assignment]
    url = _announce(settings, listener)
    print(f"Tunesmith is at {url}  (docs: {url}/docs)", file=sys.stderr, flush=True)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    hands = Hands(settings) if should_start_worker else None
    keeping = asyncio.create_task(hands.keep(stopping)) if hands else None
    asked = asyncio.create_task(stopping.wait())
    await asyncio.wait([serving, asked], return_when=asyncio.FIRST_COMPLETED)
    stopping.set()
    if keeping is not None:
        await keeping
    if server.started:
        app.state.watcher.close()
    server.should_exit = True
    await serving
    asked.cancel()
    _withdraw(settings)
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: trainers are stopped before the door is closed."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class Hands:
    """The worker process that the server starts, in a session of its own, and starts again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    async def keep(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; a worker that outlived an earlier server is left as it is."""
        pause, started = 0.5, -math.inf
        while not stopping.is_set():
            if self._has_ended():
                is_short_lived = time.monotonic() - started < 60
                pause = min(pause * 2, 30) if is_short_lived else 0.5
            try:
                if self._process is None and not worker.is_running(self._settings):
                    self._process, started = self._start(), time.monotonic()
            except OSError as error:
                log.error("the worker cannot be started: %s", error)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.wait(), pause)
        await self._stop()

    def _has_ended(self) -> bool:
        """Whether the worker that was started here has just gone by itself."""
        status = None if self._process is None else self._process.poll()
        if status is None:
            return False
        self._process = None
        if status == worker.EXIT_LOCKED:
            return False
        log.error("the worker ended with status %s; another is started", status)
        return True

    def _start(self) -> "subprocess.Popen[bytes]":
        logs = self._settings.workspace.resolve() / "logs"
        logs.mkdir(exist_ok=True)
        place = logs / "worker.log"
        if place.exists() and place.stat().st_size > self._settings.server_log_bytes:
            place.replace(logs / "worker.log.1")
        with place.open("ab") as journal:
            return subprocess.Popen(
                [sys.executable, "-m", "tunesmith.work.worker"],
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
                env=os.environ | _as_environment(self._settings),
                start_new_session=True,
            )

    async def _stop(self) -> None:
        """Also a worker that an earlier server left behind, and one that is only just starting."""
        deadline = time.monotonic() + WORKER_STOP_SECONDS
        asked: set[int] = set()
        while pids := self._living():
            if time.monotonic() > deadline:
                log.error("the worker did not stop in %d s; killed", WORKER_STOP_SECONDS)
                _send(pids, signal.SIGKILL)
                return
            _send(pids - asked, signal.SIGTERM)
            asked |= pids
            await asyncio.sleep(0.05)

    def _living(self) -> set[int]:
        own = self._process
        pids = {own.pid} if own is not None and own.poll() is None else set()
        found = worker.running_pid(self._settings)
        return pids if found is None else pids | {found}


def _send(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _as_environment(settings: Settings) -> dict[str, str]:
    """Settings of this process that a child must read the same way."""
    shown = {name: getattr(settings, name) for name in _SHARED}
    shown["workspace"] = settings.workspace.resolve()
    return {
        _SETTINGS_PREFIX + name.upper(): str(value)
        for name, value in shown.items()
        if value is not None
    }


def _bind(settings: Settings) -> socket.socket:
    """Take the port before anything else is touched. Raises ConflictError where it is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConflictError(
            f"port {settings.port} of {settings.host} cannot be taken ({error.strerror}); another "
            "server may be running: choose another with --port, or --port 0 for a free one"
        ) from None
    return listener


def _refuse_open_doors(settings: Settings, hub: Hub) -> None:
    if not is_loopback(settings.host) and not hub.store.read(keys.has_any):
        raise BadRequestError(
            f"refusing to listen on {settings.host} without a key: anyone could train and read "
            "here. Make one first: tunesmith keys make --owner NAME"
        )


def _announce(settings: Settings, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    body = {"url": url, "pid": os.getpid(), "pid_space": pid_space()}
    write_durably(settings.home / "api.json", json.dumps(body).encode())
    return url


def _withdraw(settings: Settings) -> None:
    """Take the address away, where it is still ours."""
    place = settings.home / "api.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(place.read_bytes())["pid"] == os.getpid():
            place.unlink()


def _log_to_file(settings: Settings) -> None:
    folder = settings.workspace.resolve() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    file = logging.handlers.RotatingFileHandler(
        folder / "tunesmith.log", maxBytes=settings.server_log_bytes // 4, backupCount=3
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(), file]
    for handler in handlers:
        handler.setFormatter(form)
    logging.basicConfig(level=settings.log_level, handlers=handlers)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _reload(settings: Settings, role: str, should_start_worker: bool) -> int:
    """For development: serve in a child that is started again when the source changes."""
    from uvicorn.supervisors import ChangeReload

    package = str(Path(__file__).resolve().parents[1])
    config = uvicorn.Config(
        "tunesmith.api.app:app_from_environment", reload_dirs=[package], reload=True
    )
    os.environ.update(_as_environment(settings))
    listener = _bind(settings)
    with contextlib.suppress(KeyboardInterrupt):
        ChangeReload(config, target=_reloaded, sockets=[listener]).run()
    return 0


def _reloaded(sockets: list[socket.socket] | None) -> None:
    assert sockets
    settings = Settings.read()
    _log_to_file(settings)
    with Hub.open(settings) as hub:
        asyncio.run(_serve(hub, sockets[0], "all", True))

"""The server as a process: its port, its log, its address file, and the worker beside it."""

import asyncio
import contextlib
import gc
import logging
import logging.handlers
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI

from tunesmith.api.address import Address
from tunesmith.api.app import create_app
from tunesmith.api.descriptors import room_for_connections
from tunesmith.api.protocol import Protocol
from tunesmith.errors import BadRequestError, ConflictError, TuningAPIError
from tunesmith.hub import Hub
from tunesmith.hub.principal import is_loopback
from tunesmith.settings import Settings
from tunesmith.store import keys
from tunesmith.work import worker

log = logging.getLogger(__name__)

EXIT_REFUSED = 78
WORKER_STOP_SECONDS = 40
END_SECONDS = 5.0
"""After requests in flight had their time: for the rest to end, before the process is left."""
GARBAGE = 10_000
"""Objects more than before, until garbage is looked for: Python's 700 costs a busy server 6 %."""
_SETTINGS_PREFIX = "TUNESMITH_"
_SHARED = (
    "workspace",
    "cpu_slots",
    "memory_reserve_bytes",
    "heartbeat_seconds",
    "max_log_bytes",
    "log_format",
    "engine_command",
    "should_fork_trainers",
    "log_level",
    "bell",
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
            return _run(_serve(hub, listener, role, should_start_worker))
    except TuningAPIError as refusal:
        print(f"tunesmith: {refusal.message}", file=sys.stderr)
        return EXIT_REFUSED


def _run(serving: Coroutine[Any, Any, int]) -> int:
    """On uvloop where it is installed, and without looking through what stays for garbage."""
    gc.freeze()
    gc.set_threshold(GARBAGE)
    try:
        from uvloop import new_event_loop
    except ImportError:  # Windows has none
        return asyncio.run(serving)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(serving)


async def _serve(hub: Hub, listener: socket.socket, role: str, should_start_worker: bool) -> int:
    settings = hub.settings
    config = uvicorn.Config(
        create_app(hub, role),
        log_config=None,
        access_log=False,
        http=Protocol,
        limit_concurrency=room_for_connections() + 1,  # uvicorn refuses the one that reaches it
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + 2,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)
    app: FastAPI = config.app  # type: ignore[assignment]
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    hands = _hands(settings) if should_start_worker else None
    worker_seconds = WORKER_STOP_SECONDS if hands else 0
    deadline = _Deadline(worker_seconds + settings.drain_seconds + END_SECONDS)

    def stop(number: int, frame: FrameType | None) -> None:
        deadline.begin()
        with contextlib.suppress(RuntimeError):  # the loop has ended, the rest ends too
            loop.call_soon_threadsafe(stopping.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address = Address(settings.home, listener)
    address.write()
    url = address.url
    print(f"Tunesmith is at {url}  (docs: {url}/docs)", file=sys.stderr, flush=True)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    keeping = asyncio.create_task(hands.keep(stopping)) if hands else None
    asked = asyncio.create_task(stopping.wait())
    naming = asyncio.create_task(address.keep(settings.reaper_seconds))
    await asyncio.wait([serving, asked], return_when=asyncio.FIRST_COMPLETED)
    stopping.set()
    deadline.begin()
    if keeping is not None:
        await keeping
    if server.started:
        app.state.watcher.close()
    server.should_exit = True
    cut = loop.call_later(settings.drain_seconds, app.state.in_flight.cut)
    await serving
    cut.cancel()
    asked.cancel()
    naming.cancel()
    address.withdraw()
    if hands is not None:  # one of a server before, that has come to life only now
        await hands.stop()
    return 0 if server.started else 1


class _Deadline:
    """Leaves the process where its end hangs, in a database that does not answer for one: what was
    acknowledged is on the disk. A thread, since it may be the loop that hangs."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun = threading.Event()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def begin(self) -> None:
        self._begun.set()

    def _watch(self) -> None:
        self._begun.wait()
        time.sleep(self._seconds)
        log.error("the server could not end in %.1f s; left as it is", self._seconds)
        os._exit(1)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: trainers are stopped before the door is closed."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _hands(settings: Settings) -> "Hands | None":
    """What runs beside the server: a worker, Ray's dispatcher, or nothing where Celery has them."""
    if settings.bell == "celery":
        return None
    return Hands(settings, "dispatcher" if settings.bell == "ray" else "worker")


class Hands:
    """The worker process that the server starts, in a session of its own, and starts again.

    Or Ray's dispatcher, which has its hands elsewhere.
    """

    def __init__(
        self, settings: Settings, name: Literal["worker", "dispatcher"] = "worker"
    ) -> None:
        self._settings = settings
        self._name = name
        self._lock = worker.LOCK if name == "worker" else "dispatcher.lock"
        self._program = ["tunesmith.work.worker", "--beside"]
        if name == "dispatcher":
            self._program = ["tunesmith.work.ray"]
        self._process: subprocess.Popen[bytes] | None = None

    async def keep(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; a worker that outlived an earlier server is left as it is."""
        pause, started = 0.5, -math.inf
        while not stopping.is_set():
            if self._has_ended():
                is_short_lived = time.monotonic() - started < 60
                pause = min(pause * 2, 30) if is_short_lived else 0.5
            try:
                if self._process is None and not worker.is_running(self._settings, self._lock):
                    self._process, started = self._start(), time.monotonic()
            except OSError as error:
                log.error("the %s cannot be started: %s", self._name, error)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.wait(), pause)
        await self.stop()

    def _has_ended(self) -> bool:
        """Whether the worker that was started here has just gone by itself."""
        status = None if self._process is None else self._process.poll()
        if status is None:
            return False
        self._process = None
        if status == worker.EXIT_LOCKED:
            return False
        log.error("the %s ended with status %s; another is started", self._name, status)
        return True

    def _start(self) -> "subprocess.Popen[bytes]":
        logs = self._settings.workspace.resolve() / "logs"
        logs.mkdir(exist_ok=True)
        place = logs / f"{self._name}.log"
        if place.exists() and place.stat().st_size > self._settings.server_log_bytes:
            place.replace(logs / f"{self._name}.log.1")
        with place.open("ab") as journal:
            return subprocess.Popen(
                [sys.executable, "-m", *self._program],
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
                env=os.environ | _as_environment(self._settings),
                start_new_session=True,
            )

    async def stop(self) -> None:
        """Also a worker that an earlier server left behind, and one that is only just starting.

        Until its process has gone: it gives its lock back a moment before.
        """
        deadline = time.monotonic() + WORKER_STOP_SECONDS
        asked: set[int] = set()
        while pids := self._living() | set(filter(worker.is_ours, asked)):
            if time.monotonic() > deadline:
                log.error("the %s did not stop in %d s; killed", self._name, WORKER_STOP_SECONDS)
                _send(pids, signal.SIGKILL)
                return
            _send(pids - asked, signal.SIGTERM)
            asked |= pids
            await asyncio.sleep(0.05)

    def _living(self) -> set[int]:
        own = self._process
        pids = {own.pid} if own is not None and own.poll() is None else set()
        found = worker.running_pid(self._settings, self._lock)
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
    assert hub.depot.elsewhere or not settings.object_store_url  # refused where it is no address
    if not is_loopback(settings.host) and not hub.store.read(keys.has_any):
        raise BadRequestError(
            f"refusing to listen on {settings.host} without a key: anyone could train and read "
            "here. Make one first: tunesmith keys create --owner NAME"
        )


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
    config = uvicorn.Config("tunesmith.api.app:app", reload_dirs=[package], reload=True)
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
        _run(_serve(hub, sockets[0], "all", True))

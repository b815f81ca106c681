"""Keeps this host's one worker alive, in a process of its own, while another program runs."""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time

from tunesmith.settings import Settings
from tunesmith.work import worker

log = logging.getLogger(__name__)

STOP_SECONDS = 40.0
"""For a worker to see its trainers off, before it is killed."""
LOOK_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0


class Keeper:
    """Starts a worker unless one is here already, and another where it ends.

    The worker dies with the thread that started it, and so with this process, however that ends.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._patience_seconds = STOP_SECONDS
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Trainers write a checkpoint and end; what is left after `seconds` is killed.

        A worker that another program started is let be. Called again, nothing happens.
        """
        if not self._stopping.is_set():
            self._patience_seconds = seconds
            self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._keep()
        finally:  # with the end of this thread, its child is killed
            self._see_off()

    def _keep(self) -> None:
        pause, started = LOOK_SECONDS, -math.inf
        while not self._stopping.is_set():
            if self._has_ended():
                is_short_lived = time.monotonic() - started < 60
                pause = min(pause * 2, MAX_PAUSE_SECONDS) if is_short_lived else LOOK_SECONDS
            try:
                if self._process is None and not worker.is_running(self._settings):
                    self._process, started = start(self._settings), time.monotonic()
            except OSError as error:
                log.error("the worker cannot be started: %s", error)
            self._stopping.wait(pause)

    def _see_off(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(self._patience_seconds)
        except subprocess.TimeoutExpired:
            log.error("the worker did not stop in %.0f s; killed", self._patience_seconds)
            process.kill()
            process.wait()

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


def start(
    settings: Settings, *arguments: str, environment: dict[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start `python -m tunesmith.work.worker` in a session of its own; it dies with this thread.

    It works for the API of the workspace, or, with TUNESMITH_WORKER_TOKEN, for the one at
    TUNESMITH_BASE_URL. Its log is `logs/worker.log` of the workspace. Raises OSError.
    """
    workspace = settings.workspace.resolve()
    remote = ["--server", settings.base_url] if is_remote(settings) else []
    with _journal(settings) as journal:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tunesmith.work.worker"),
                *("--parent", str(os.getpid()), *remote, *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=journal,
            stderr=journal,
            env=os.environ | {"TUNESMITH_WORKSPACE": str(workspace)} | (environment or {}),
            start_new_session=True,
        )


def is_remote(settings: Settings) -> bool:
    """Whether the API is another host's: its address and a token were given."""
    return bool(settings.base_url and settings.worker_token.get_secret_value())


def _journal(settings: Settings):  # type: ignore[no-untyped-def]
    """Moved aside where it has grown; raises OSError."""
    logs = settings.workspace.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    place = logs / "worker.log"
    with contextlib.suppress(FileNotFoundError):
        if place.stat().st_size > settings.server_log_bytes:
            place.replace(logs / "worker.log.1")
    return place.open("ab")

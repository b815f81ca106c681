"""Private servers for tests: PostgreSQL and Redis, each in a folder and on a port of its own.

`make test` installs them where it may. Where one is missing a test is skipped, with a line that
says so; under CI it fails.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

PATIENCE = 60.0
_SYSTEM_USER = "postgres"
"""PostgreSQL refuses to run as root: then it runs as this user, whom its package made."""


def free_port() -> int:
    """Below those that the kernel hands out: else, while a server is down, a client that tries to
    reach it may be given this very port and find itself."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def program(name: str) -> str:
    """The path of a server's program; skips the test, or fails it under CI, where there is none."""
    for folder in [None, *sorted(map(str, Path("/").glob("usr/lib/postgresql/*/bin")))]:
        found = shutil.which(name, path=folder)
        if found:
            return found
    told = f"{name} is not installed: `make servers` installs it where it may"
    if os.environ.get("CI"):
        pytest.fail(told)
    pytest.skip(told)


def wait_for(is_there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_there():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@dataclass
class Postgres:
    """A cluster. `database()` makes a fresh, empty database and returns its URL."""

    folder: Path
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ()
    """More settings, as `name=value`."""
    _made: int = 0

    def start(self) -> "Postgres":
        """Make the cluster where there is none, and wait until it answers."""
        data = self.folder / "data"
        if not data.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for place in (self.folder, *self.folder.parents):  # its user must get there
                with contextlib.suppress(PermissionError):
                    place.chmod(place.stat().st_mode | 0o011)
            if self._user:
                shutil.chown(self.folder, self._user)
            self._run("initdb", "-D", str(data), "-A", "trust", "-U", "tunesmith", "-E", "UTF8")
            self._start_anywhere(data)
        else:
            self._start(data)
        return self

    def _start_anywhere(self, data: Path) -> None:
        """A free port may be another's by now."""
        for _ in range(5):
            with contextlib.suppress(subprocess.CalledProcessError):
                return self._start(data)
            self.port = free_port()
        return self._start(data)

    def _start(self, data: Path) -> None:
        settings = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self.folder}",
            "shared_buffers=32MB",
            "max_connections=200",
            *self.options,
        ]
        flags = " ".join(f"-c {setting}" for setting in settings)
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(data), "-l", log, "-o", flags, "-w", "-t", "120", "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is as a crash: recovery at the next start."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", mode, "-w", "stop")

    def restart(self, mode: str = "immediate") -> None:
        self.stop(mode)
        self.start()

    def url(self, name: str = "postgres") -> str:
        return f"postgresql+psycopg://tunesmith@127.0.0.1:{self.port}/{name}"

    def connect(self, name: str = "postgres") -> "psycopg.Connection[tuple[object, ...]]":
        address = f"host=127.0.0.1 port={self.port} user=tunesmith dbname={name}"
        return psycopg.connect(address, autocommit=True)

    def database(self) -> str:
        self._made += 1
        name = f"t{os.getpid()}_{self._made}"
        with self.connect() as connection:
            connection.execute(f"create database {name}")
        return self.url(name)

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [program(name), *arguments],
            check=True,
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    @property
    def _user(self) -> str | None:
        return _SYSTEM_USER if os.geteuid() == 0 else None


@dataclass
class Redis:
    folder: Path
    port: int = field(default_factory=free_port)
    _process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> "Redis":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [
                *(program("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self.folder)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.answers, "Redis")
        return self

    def answers(self) -> bool:
        import redis

        with contextlib.closing(redis.Redis(port=self.port)) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def flush(self) -> None:
        import redis

        with contextlib.closing(redis.Redis(port=self.port)) as client:
            client.flushall()

    def stop(self) -> None:
        """As a crash: nothing that it held is kept."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@contextlib.contextmanager
def open_postgres(folder: Path, *options: str) -> Iterator[Postgres]:
    """Where it runs as another user it lies outside `folder`, which pytest makes private again
    whenever another run of tests begins."""
    folder.mkdir(parents=True, exist_ok=True)
    around = None if os.geteuid() == 0 else folder
    with tempfile.TemporaryDirectory(prefix="postgres-", dir=around) as place:
        cluster = Postgres(Path(place) / "cluster", options=options)
        try:
            yield cluster.start()
        finally:
            cluster.stop("immediate")


@contextlib.contextmanager
def open_redis(folder: Path) -> Iterator[Redis]:
    server = Redis(folder)
    try:
        yield server.start()
    finally:
        server.stop()

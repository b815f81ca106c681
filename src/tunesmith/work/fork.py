"""How a trainer or an engine is started: forked from a warm process, or cold where there is none.

The forking process (`python -m tunesmith.train.zygote`) is a child of the worker's main thread, so
that the parent-death signal goes from the worker down to the last trainer.
"""

import array
import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.work.session import die_with_parent, kill_session

log = logging.getLogger(__name__)

QUIET_THREADS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}
"""Threads that wait must not spin: it is worth half the CPU with four jobs at once."""

FORK_SECONDS = 10.0
AGAIN_SECONDS = 5.0
"""Between two starts of the forking process."""
MAX_LOG_BYTES = 4 << 20
"""Of the forking process's own log, looked at when it starts."""
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "DATABASE_URL")


def child_environment() -> dict[str, str]:
    """This process's environment without its secrets, with quiet threads."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(word in name.upper() for word in _SECRET_WORDS)
    }
    return kept | QUIET_THREADS


@dataclass
class Child:
    """A started process, leader of a session of its own."""

    pid: int
    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader
    exited: "asyncio.Future[int]" = field(repr=False)
    """The exit status, negative for a signal."""
    pipes: tuple[asyncio.BaseTransport, ...] = field(default=(), repr=False)

    async def hand_over(self, body: bytes) -> None:
        """Write to its stdin, then close it. One that does not read to the end is let be."""
        with contextlib.suppress(ConnectionError):
            self.stdin.write(body)
            await self.stdin.drain()
        self.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """The whole session; also when the leader has gone and left something behind."""
        self.signal(signal.SIGKILL)  # it may lead no session yet
        kill_session(self.pid)

    def close(self) -> None:
        """Close our ends of its pipes, whoever may still hold the others."""
        for pipe in self.pipes:
            pipe.close()


class Forker:
    """Starts children. Call from the event loop of the worker's main thread only."""

    def __init__(self, is_warm: bool, log_path: Path) -> None:
        self._is_warm = is_warm
        self._log_path = log_path
        self._zygote: _Zygote | None = None
        self._retired: list[_Zygote] = []
        self._started = -math.inf

    def warm_up(self) -> None:
        """Start the forking process in the background; until it is ready, starts are cold.

        One that ends is started anew, but not at once: where it can't live, others must.
        """
        if not self._is_warm or not (self._zygote is None or self._zygote.is_dead):
            return
        if self._zygote is not None and time.monotonic() - self._started < AGAIN_SECONDS:
            return
        self._started = time.monotonic()
        try:
            self._zygote = _Zygote(self._log_path)
        except OSError as error:
            log.error("the forking process cannot be started: %s", error)

    @property
    def is_ready(self) -> bool:
        return self._zygote is not None and self._zygote.is_ready and not self._zygote.is_dead

    async def wait_ready(self, seconds: float) -> None:
        """Wait for the forking process: it comes sooner than a cold start that begins now."""
        if self._zygote is not None and not self._zygote.is_dead:
            await asyncio.wait([self._zygote.ready], timeout=seconds)

    async def start(
        self, module: str, argv: list[str], environment: dict[str, str] | None = None
    ) -> Child:
        """Start `python -m module argv…` in a session of its own. Raises OSError."""
        await self.wait_ready(30)
        (in_r, in_w), (out_r, out_w), (err_r, err_w) = _pipes(3)
        theirs = (in_r, out_w, err_w)
        try:
            pid, exited = await self._launch(module, argv, environment or {}, theirs)
        except BaseException:
            for descriptor in (in_w, out_r, err_r):
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        stdin = await _writer(in_w)
        (stdout, out), (stderr, err) = await _reader(out_r), await _reader(err_r)
        return Child(pid, stdin, stdout, stderr, exited, (stdin.transport, out, err))

    async def _launch(
        self, module: str, argv: list[str], environment: dict[str, str], fds: tuple[int, ...]
    ) -> "tuple[int, asyncio.Future[int]]":
        self.warm_up()
        if self.is_ready:
            assert self._zygote is not None
            try:
                return await self._zygote.fork(module, argv, environment, fds)
            except TimeoutError:
                log.warning("the forking process does not answer; starting cold")
                self._retire(self._zygote)
            except OSError as error:
                log.warning("the forking process refused (%s); starting cold", error)
        return _cold(module, argv, environment, fds)

    def _retire(self, zygote: "_Zygote") -> None:
        """No more is asked of it, but what it forked lives on, and its ends are heard."""
        self._retired = [old for old in self._retired if not old.is_dead]
        self._retired.append(zygote)
        zygote.retire()
        self._zygote = None

    def close(self) -> None:
        for zygote in [*self._retired, *([self._zygote] if self._zygote else [])]:
            zygote.close()


class _Zygote:
    """Our end of the forking process's socket."""

    def __init__(self, log_path: Path) -> None:
        loop = asyncio.get_running_loop()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            with theirs:
                self._process = _start_zygote(theirs.fileno(), log_path)
        except BaseException:
            self._socket.close()
            raise
        self._asked = 0
        self._pids: dict[str, asyncio.Future[int]] = {}
        self._exits: dict[int, asyncio.Future[int]] = {}
        self.ready: asyncio.Future[None] = loop.create_future()
        self.is_dead = False
        self._is_retired = False
        loop.add_reader(self._socket.fileno(), self._read)

    @property
    def is_ready(self) -> bool:
        return self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None

    async def fork(
        self, module: str, argv: list[str], environment: dict[str, str], fds: tuple[int, ...]
    ) -> "tuple[int, asyncio.Future[int]]":
        """Raises OSError where it refuses, or ends; TimeoutError where it does not answer."""
        self._asked += 1
        ticket = str(self._asked)
        loop = asyncio.get_running_loop()
        request = {
            "id": ticket,
            "module": module,
            "argv": argv,
            "env": environment,
            "cwd": os.getcwd(),
        }
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self._socket.sendmsg([json.dumps(request).encode()], rights)
        asked = self._pids[ticket] = loop.create_future()
        pid = await asyncio.wait_for(asked, FORK_SECONDS)
        return pid, self._exits[pid]

    def retire(self) -> None:
        self._is_retired = True
        self._leave()

    def close(self) -> None:
        """End the forking process; it kills its children's sessions."""
        if self.is_dead:
            return
        self.is_dead = True
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._forget(OSError("the forking process has ended"))

    def _read(self) -> None:
        try:
            packet = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.close()
            return
        said = json.loads(packet)
        if said.get("ready"):
            if not self.ready.done():
                self.ready.set_result(None)
        elif "exit" in said:
            self._hear_exit(said["pid"], int(said["exit"]))
        else:
            self._hear_answer(said)

    def _hear_exit(self, pid: int, status: int) -> None:
        ended = self._exits.pop(pid, None)
        if ended is not None and not ended.done():
            ended.set_result(status)
        self._leave()

    def _hear_answer(self, said: dict[str, Any]) -> None:
        asked = self._pids.pop(str(said.get("id")), None)
        is_waited_for = asked is not None and not asked.done()
        if "pid" not in said:
            if is_waited_for and asked is not None:
                asked.set_exception(OSError(str(said.get("error"))))
            return
        self._exits[said["pid"]] = asyncio.get_running_loop().create_future()
        if is_waited_for and asked is not None:
            asked.set_result(said["pid"])
        else:
            log.warning("a process that was forked too late is killed: %d", said["pid"])
            _kill(said["pid"])

    def _leave(self) -> None:
        """Once retired, it ends with the last of its children."""
        if self._is_retired and not self._exits and not self._pids:
            self.close()

    def _forget(self, error: OSError) -> None:
        for asked in self._pids.values():
            if not asked.done():
                asked.set_exception(error)
        for pid, ended in self._exits.items():
            _kill(pid)
            if not ended.done():
                ended.set_result(-int(signal.SIGKILL))
        self._pids.clear()
        self._exits.clear()
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()


def _start_zygote(descriptor: int, log_path: Path) -> "subprocess.Popen[bytes]":
    log_path.parent.mkdir(parents=True, exist_ok=True)
    mode = "wb" if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES else "ab"
    with log_path.open(mode) as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "tunesmith.train.zygote", str(descriptor)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=child_environment(),
            pass_fds=[descriptor],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def _kill(pid: int) -> None:
    """A child of the forking process that nobody has a hold of; it may lead no session yet."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    kill_session(pid)


def _cold(
    module: str, argv: list[str], environment: dict[str, str], fds: tuple[int, ...]
) -> "tuple[int, asyncio.Future[int]]":
    process = subprocess.Popen(
        [sys.executable, "-m", module, *argv],
        stdin=fds[0],
        stdout=fds[1],
        stderr=fds[2],
        env=child_environment() | environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()
    descriptor = os.pidfd_open(process.pid)

    def ended() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        exited.set_result(process.wait())

    loop.add_reader(descriptor, ended)
    return process.pid, exited


def _pipes(count: int) -> list[tuple[int, int]]:
    """All of them, or none. Raises OSError."""
    pipes: list[tuple[int, int]] = []
    try:
        for _ in range(count):
            pipes.append(os.pipe())
    except OSError:
        for descriptor in (end for pipe in pipes for end in pipe):
            os.close(descriptor)
        raise
    return pipes


async def _reader(descriptor: int) -> tuple[asyncio.StreamReader, asyncio.BaseTransport]:
    reader = asyncio.StreamReader(limit=1 << 18)
    protocol = asyncio.StreamReaderProtocol(reader)
    file = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, file)
    return reader, transport


async def _writer(descriptor: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    file = os.fdopen(descriptor, "wb", buffering=0)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, file)
    return asyncio.StreamWriter(transport, protocol, None, loop)

"""The engine's process: one model, served on one address until it is told to stop.

    python -m tunesmith.infer.server --model PATH --model-name NAME --port 0

One line of JSON on stdout tells that it accepts requests ({"type": "ready", "port", "pid"}) or why
it never will ({"type": "failed", "message"}). All else goes to stderr. SIGTERM ends it after the
requests under way, SIGKILL's from the parent come by themselves with `--die-with-parent`.
"""

import argparse
import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import transformers
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from tunesmith.errors import BadRequestError, TuningAPIError
from tunesmith.infer.app import make_app
from tunesmith.infer.house import House
from tunesmith.infer.keyring import Keyring
from tunesmith.infer.loading import Loader, Wanted
from tunesmith.infer.precision import PRECISIONS, Precision
from tunesmith.infer.scheduler import Limits
from tunesmith.journal import formatter
from tunesmith.settings import Settings

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Start:
    """What the process was told to serve."""

    model: Path
    model_name: str
    host: str
    port: int
    key: str
    threads: int
    device: str
    cache_bytes: int
    running: int
    waiting: int
    max_body_bytes: int
    grace_seconds: int
    adapters: dict[str, Path]
    precision: Precision


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM. Returns 0 after an orderly end, 1 where the model cannot be served.

    May be called in a process forked from one that has this module imported and no threads.
    """
    options = _parser().parse_args(argv)
    settings = Settings.read()
    if options.die_with_parent:
        die_with_parent(options.parent_pid)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    written = logging.StreamHandler()
    written.setFormatter(formatter(settings.log_format))
    logging.basicConfig(level=options.log_level, handlers=[written], force=True)
    with _announcements() as out:
        try:
            start = _start(options)
            listener = _listen(start.host, start.port)
            torch.set_num_threads(start.threads)
            transformers.utils.logging.disable_progress_bar()
            house = furnish(start)
        except (TuningAPIError, OSError, MemoryError, RuntimeError) as error:
            log.exception("the engine cannot start")
            _say(out, {"type": "failed", "message": str(error)[:4000] or type(error).__name__})
            return 1
        server = _Server(make_app(house, settings), out, start.grace_seconds)
        asyncio.run(server.serve(sockets=[listener]))
    return 0


def furnish(start: Start) -> House:
    """Load the model and its adapters, and size the cache. Raises BadRequestError and others."""
    loader = Loader(
        device=start.device,
        threads=start.threads,
        cache_bytes=start.cache_bytes,
        running=start.running,
        waiting=start.waiting,
    )
    wanted = Wanted(start.model, start.model_name, start.precision, start.adapters)
    return House(loader(wanted), loader, Keyring(start.key), start.max_body_bytes)


class _Server(uvicorn.Server):
    """Uvicorn's server, which announces itself and ends with status 0 on SIGTERM."""

    def __init__(self, app: FastAPI, out: TextIO, grace_seconds: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=grace_seconds,
            )
        )
        self._out = out

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets and not self.should_exit:
            port = sockets[0].getsockname()[1]
            _say(self._out, {"type": "ready", "port": port, "pid": os.getpid()})

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid and os.getppid() != parent_pid:
        os._exit(1)  # the parent ended before the request was in force


@contextmanager
def _announcements() -> Iterator[TextIO]:
    """The stdout we were given, for announcements alone: descriptor 1 is the log from here on."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


def _say(out: TextIO, message: dict[str, object]) -> None:
    """A reader that has gone is no reason to stop."""
    try:
        out.write(json.dumps(message, ensure_ascii=False) + "\n")
        out.flush()
    except OSError:
        log.warning("nobody reads the announcements")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def _start(options: argparse.Namespace) -> Start:
    key = os.environ.get(options.key_env, "") if options.key_env else ""
    if options.key_env and not key:
        raise BadRequestError(f"--key-env names {options.key_env}, which is not set")
    model = Path(options.model).resolve()
    return Start(
        model=model,
        model_name=options.model_name or model.name,
        host=options.host,
        port=options.port,
        key=key,
        threads=options.threads,
        device=options.device,
        cache_bytes=options.cache_bytes,
        running=options.max_running,
        waiting=options.max_waiting,
        max_body_bytes=options.max_body_bytes,
        grace_seconds=options.grace_seconds,
        adapters=dict(_named(each) for each in options.adapter),
        precision=options.precision,
    )


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise BadRequestError(f"--adapter takes NAME=PATH, not {text!r}")
    return name, Path(path).resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunesmith.infer.server", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a full model or of an adapter")
    parser.add_argument("--model-name", default="", help="what requests call it; the folder's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_between(0, 65535), default=0, help="0 takes a free one")
    parser.add_argument("--key-env", default="", help="environment variable with the bearer key")
    parser.add_argument("--threads", type=_between(1, 4096), default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--cache-bytes", type=_between(0, 1 << 50), default=0, help="0: by memory")
    parser.add_argument("--max-running", type=_between(1, 4096), default=Limits.running)
    parser.add_argument("--max-waiting", type=_between(1, 1 << 20), default=Limits.waiting)
    parser.add_argument("--max-body-bytes", type=_between(1024, 1 << 32), default=16 << 20)
    parser.add_argument("--grace-seconds", type=_between(0, 86_400), default=10)
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING"))
    parser.add_argument("--die-with-parent", action="store_true")
    parser.add_argument("--parent-pid", type=_between(0, 1 << 31), default=0)
    return parser


def _between(low: int, high: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}")
        return value

    return check


def __getattr__(name: str) -> ASGIApp:
    """`app`, for any ASGI server. See `standalone`."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tunesmith.infer.standalone import Standalone

    return Standalone()


if __name__ == "__main__":
    sys.exit(main())

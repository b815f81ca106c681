"""A process with everything imported, from which trainers and engines are forked.

    python -m tunesmith.train.zygote <descriptor of a SOCK_SEQPACKET socket>

It says {"ready": true, "pid"} when it can fork. A request is one packet of JSON, {"id", "module",
"argv", "env", "cwd"}, that carries the child's stdin, stdout and stderr (SCM_RIGHTS). The answers
are {"id", "pid"}, or {"id", "error"}, and at the child's end {"id", "pid", "exit"}: its status, or
the negative of the signal that killed it.

One thread, no CUDA, no parallel region: what is forked starts clean. Each child leads a session of
its own and dies with this process; this process dies with its parent, or where the socket closes.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from tunesmith.spec.strict import Strict
from tunesmith.train import process

MAX_PACKET = 1 << 18
MODULES = {
    "tunesmith.train": "tunesmith.train.__main__",
    "tunesmith.train.launch": "tunesmith.train.launch",
    "tunesmith.infer.server": "tunesmith.infer.server",
    "tunesmith.infer.gate": "tunesmith.infer.gate",
}
"""What may be run, and where its `main` is."""


class ForkRequest(Strict):
    id: int | str
    module: str
    argv: tuple[str, ...] = Field((), max_length=1000)
    env: dict[str, str] = Field({}, max_length=1000)
    cwd: str = "/"


@dataclass(frozen=True)
class Packet:
    body: bytes
    descriptors: list[int]


class Zygote:
    """Serves requests until the socket closes."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._children: dict[int, int | str] = {}
        """pid → id of the request."""

    def serve(self) -> None:
        woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._private = [woken, waker, self._wire.fileno()]
        self._say({"ready": True, "pid": os.getpid()})
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            self._private.append(selector.fileno())
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if woken in ready:
                    os.read(woken, 4096)
                    self._reap()
                if self._wire.fileno() in ready and not self._answer():
                    return

    def kill_all(self) -> None:
        for child in self._children:
            for kill in (os.killpg, os.kill):
                try:
                    kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _answer(self) -> bool:
        """Take one request. False at the end of the socket."""
        packet = _receive(self._wire)
        if packet is None:
            return False
        try:
            request = ForkRequest.model_validate_json(packet.body)
            _check(request, packet)
            self._fork(request, packet.descriptors)
        except (ValidationError, ValueError, OSError) as error:
            self._say({"id": _id_of(packet.body), "error": str(error)[:4000]})
        finally:
            for descriptor in packet.descriptors:
                os.close(descriptor)
        return True

    def _fork(self, request: ForkRequest, descriptors: list[int]) -> None:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _live(lambda: _become(request, descriptors, parent, self._private))
        self._children[child] = request.id
        self._say({"id": request.id, "pid": child})

    def _reap(self) -> None:
        for child in list(self._children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._say({"id": self._children.pop(child), "pid": child, "exit": code})

    def _say(self, answer: dict[str, Any]) -> None:
        self._wire.send(json.dumps(answer).encode())


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not arguments[0].isdigit():
        print(__doc__, file=sys.stderr)
        return 2
    _fill_standard_descriptors()
    wire = socket.socket(fileno=int(arguments[0]))
    wire.set_inheritable(False)
    process.quiet_environment()
    process.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload()
    zygote = Zygote(wire)
    try:
        zygote.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        zygote.kill_all()
    return 0


def preload() -> None:
    """Import all that a first step needs, and run what imports more at its first use."""
    import torch

    torch.set_num_threads(1)
    from tunesmith.train import warm

    warm.up()
    for name in MODULES.values():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _fill_standard_descriptors() -> None:
    """So that no descriptor that comes in later is 0, 1 or 2."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)


def _live(life: Callable[[], int]) -> None:
    """Run the child's life and end the process, whatever happens in it."""
    code = 1
    try:
        code = life()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)


def _become(request: ForkRequest, descriptors: list[int], parent: int, private: list[int]) -> int:
    """In the child: cut every tie to the parent but its death, then run what was asked for."""
    os.setsid()
    process.die_with_parent()
    if os.getppid() != parent:
        return 1
    _reset_signals()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in {*descriptors, *private}:
        os.close(descriptor)
    os.chdir(request.cwd)
    os.environ.update(request.env)
    sys.argv = [request.module, *request.argv]
    _reopen_streams()
    module = importlib.import_module(MODULES[request.module])
    return int(module.main() or 0)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _reopen_streams() -> None:
    """The streams were set up for the parent's descriptors: start afresh on the new ones."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )


def _receive(wire: socket.socket) -> Packet | None:
    try:
        body, descriptors, _, _ = socket.recv_fds(wire, MAX_PACKET, 8)
    except ConnectionResetError:
        return None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return Packet(body, descriptors) if body else None


def _check(request: ForkRequest, packet: Packet) -> None:
    if request.module not in MODULES:
        raise ValueError(f"no module {request.module!r}: one of {', '.join(MODULES)}")
    if len(packet.descriptors) != 3:
        raise ValueError(
            f"{len(packet.descriptors)} descriptors came, not stdin, stdout and stderr"
        )


def _id_of(body: bytes) -> Any:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return found.get("id") if isinstance(found, dict) else None


if __name__ == "__main__":
    sys.exit(main())

"""A stranger's function, run where it can only compute: see `confined_child`.

It is given a time for each call, beyond which its process is killed. What it prints goes nowhere.
"""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.data import confined_child

START_SECONDS = 20.0
"""For the interpreter to start, before the code's own first lines."""
MAX_ANSWER_BYTES = 65_536
_WRITE_BYTES = 4096
"""A pipe that takes anything takes so much at once."""


class Unconfined(Exception):
    """This host cannot confine it: a sentence."""


class Failed(Exception):
    """The function, or its code, did: a sentence."""


class Confined:
    """Its process, within a `with`."""

    def __init__(self, code: str, name: str, *, memory_bytes: int, seconds: float) -> None:
        self._code, self._name = code, name
        self._memory, self._seconds = memory_bytes, seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._in = self._out = -1
        self._rest = b""

    def __enter__(self) -> "Confined":
        """Raises Unconfined, Failed."""
        asked, self._in = os.pipe()
        self._out, told = os.pipe()
        os.set_blocking(self._in, False)
        self._child = subprocess.Popen(
            [
                *(sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8"),
                confined_child.__file__,
                *map(str, (os.getpid(), asked, told, self._memory)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(asked, told),
            env={"PYTHONHASHSEED": "0"},
            cwd=Path(sys.prefix),
        )
        os.close(asked)
        os.close(told)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, arguments: dict[str, Any]) -> float:
        """What the function returns, maybe not finite. Raises Failed; then it is of no more use."""
        answer = self._exchange(arguments, self._seconds)
        value = answer.get("value")
        with suppress(OverflowError):
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        raise Failed(_told(answer))

    def close(self) -> None:
        for descriptor in (self._in, self._out):
            if descriptor >= 0:
                os.close(descriptor)
        self._in = self._out = -1
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _begin(self) -> None:
        given = {"code": self._code, "name": self._name}
        answer = self._exchange(given, START_SECONDS)
        if answer.get("confined") is not True:
            refused = answer.get("refused")
            raise Unconfined(refused if isinstance(refused, str) else "it could not be started")
        answer = self._exchange(None, self._seconds)
        if answer.get("ready") is not True:
            raise Failed(_told(answer))

    def _exchange(self, asked: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """An answer to what is asked, or, with nothing asked, the next one."""
        deadline = time.monotonic() + seconds
        try:
            if asked is not None:
                self._write(json.dumps(asked).encode() + b"\n", deadline)
            answer = json.loads(self._line(deadline))
        except TimeoutError:
            raise Failed(f"it ran for more than {seconds:g} s") from None
        except BrokenPipeError:
            raise Failed("its process ended") from None
        except (ValueError, RecursionError):
            raise Failed("its process answered what is no answer") from None
        if not isinstance(answer, dict):
            raise Failed("its process answered what is no answer")
        return answer

    def _write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._in, select.POLLOUT, deadline)
            rest = rest[os.write(self._in, rest[:_WRITE_BYTES]) :]

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            self._wait(self._out, select.POLLIN, deadline)
            part = os.read(self._out, MAX_ANSWER_BYTES)
            self._rest += part
            if not part:
                raise BrokenPipeError
            if len(self._rest) > MAX_ANSWER_BYTES:
                raise ValueError("an answer without an end")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError


def _told(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    return error[:1000] if isinstance(error, str) else "its process answered what is no answer"

"""The server's address, written down for workers and the command line of this workspace."""

import asyncio
import contextlib
import json
import os
import socket
from pathlib import Path

from tunesmith.manifest import write_durably
from tunesmith.work.wire import ADDRESS, pid_space


class Address:
    """`api.json`: of several servers, it names the one that started last, and always a living one.

    `keep` sees to that where the one that it named has ended.
    """

    def __init__(self, home: Path, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.url = (
            f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
        )
        self._place = home / ADDRESS

    def write(self) -> None:
        body = {"url": self.url, "pid": os.getpid(), "pid_space": pid_space()}
        write_durably(self._place, json.dumps(body).encode())

    async def keep(self, pause_seconds: float) -> None:
        while True:
            await asyncio.sleep(pause_seconds)
            if self._is_orphaned():
                with contextlib.suppress(OSError):  # a full disk: the next time
                    self.write()

    def withdraw(self) -> None:
        """Take it away, where it is still ours."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(self._place.read_bytes())["pid"] == os.getpid():
                self._place.unlink()

    def _is_orphaned(self) -> bool:
        """Whether it names nobody, or a process of this host that has ended."""
        try:
            note = json.loads(self._place.read_bytes())
            pid, space = int(note["pid"]), note["pid_space"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return True
        return space == pid_space() != "" and not os.path.exists(f"/proc/{pid}")

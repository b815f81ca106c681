"""Network namespaces for tests: hosts on a bridge of their own, whose links can be cut.

Each host is a namespace that a sleeping process holds; with that process it goes. Needs root, of
the machine or of a user namespace: see `needs_root`.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_NEW_NETWORK = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_LONGEST_SECONDS = "900"
"""A holder that its test has forgotten ends by itself."""


@dataclass
class Network:
    """`10.77.0.0/24`: the first host carries the bridge."""

    holders: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def add(self, name: str) -> str:
        """A host; returns its address."""
        self.holders[name] = subprocess.Popen(
            ["unshare", "-n", "sleep", _LONGEST_SECONDS], stdin=subprocess.DEVNULL
        )
        self._wait(name)
        address = f"10.77.0.{len(self.holders)}"
        self.ip(name, "link", "set", "lo", "up")
        if len(self.holders) == 1:
            self.ip(name, "link", "add", "br0", "type", "bridge")
            self.ip(name, "addr", "add", f"{address}/24", "dev", "br0")
            self.ip(name, "link", "set", "br0", "up")
        else:
            self._plug_in(name, address)
        return address

    def cut(self, name: str) -> None:
        """Pull the host's plug: what it has open, it does not hear of."""
        self.ip(self._bridge, "link", "set", f"to-{name}", "down")

    def heal(self, name: str) -> None:
        self.ip(self._bridge, "link", "set", f"to-{name}", "up")

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """This thread, and every process that it starts, is on that host."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self._pid(name)}/ns/net", os.O_RDONLY)
        try:
            _enter(there)
            yield
        finally:
            _enter(own)
            os.close(own)
            os.close(there)

    def prefix(self, name: str) -> list[str]:
        """Before a command that should run there."""
        return ["nsenter", "-t", str(self._pid(name)), "-n", "--"]

    def ip(self, name: str, *arguments: str) -> None:
        subprocess.run([*self.prefix(name), "ip", *arguments], check=True)

    def close(self) -> None:
        for holder in self.holders.values():
            holder.kill()
            holder.wait()

    @property
    def _bridge(self) -> str:
        return next(iter(self.holders))

    def _pid(self, name: str) -> int:
        return self.holders[name].pid

    def _plug_in(self, name: str, address: str) -> None:
        peer = ("peer", "name", "eth0", "netns", str(self._pid(name)))
        self.ip(self._bridge, "link", "add", f"to-{name}", "type", "veth", *peer)
        self.ip(self._bridge, "link", "set", f"to-{name}", "master", "br0", "up")
        self.ip(name, "addr", "add", f"{address}/24", "dev", "eth0")
        self.ip(name, "link", "set", "eth0", "up")

    def _wait(self, name: str) -> None:
        """Until the holder has left our namespace."""
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._pid(name)}/ns/net") == own:
            assert self.holders[name].poll() is None, "no network namespace could be made"


@contextlib.contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.close()


def has_root() -> bool:
    """Whether namespaces can be made and joined; under CI as root they must."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    tried = subprocess.run(["unshare", "-n", "true"], capture_output=True)
    if tried.returncode and os.environ.get("CI"):
        pytest.fail(f"root cannot make a network namespace: {tried.stderr.decode()}")
    return tried.returncode == 0


def run_as_root_of_a_namespace(file: Path) -> None:
    """Run a test file again where this user is root; skips loudly where that can't be."""
    become = ["unshare", "-rnm", "--"]
    if not shutil.which("unshare") or subprocess.run([*become, "true"]).returncode:
        pytest.skip("neither root nor user namespaces: worker hosts cannot be cut off here")
    again = subprocess.run([*become, sys.executable, "-m", "pytest", "-n0", "-x", str(file)])
    assert again.returncode == 0


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")

"""Servers of the OpenAI contract under the same requests: what comes out in a CPU second."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil

from pipe import QUIET
from serve_work import NEW

READY_SECONDS = 300.0


@contextlib.contextmanager
def serving(command: list[str], folder: Path, threads: int, **over: str) -> Iterator[str]:
    """A server of its own; yields its address, with `{port}` filled in the command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)} | over
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [part.format(port=port) for part in command],
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure(url: str, model: str, texts: list[str], pid_of: str) -> dict[str, Any]:
    """All texts at once, a chat each. CPU time is that of the process that listens."""
    listener = _listener(url)
    spent = _cpu(listener)
    began = time.perf_counter()
    tokens = asyncio.run(_ask_all(url, model, texts))
    return {
        "tokens": tokens,
        "wall": time.perf_counter() - began,
        "cpu": _cpu(listener) - spent,
        "peak_mb": listener.memory_info().rss / 2**20,
        "peer": pid_of,
    }


async def _ask_all(url: str, model: str, texts: list[str]) -> int:
    limits = httpx2.Limits(max_connections=200)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(text: str) -> int:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": NEW,
                "max_completion_tokens": NEW,
                "temperature": 0,
                "stream": False,
            }
            reply = await client.post("/v1/chat/completions", json=body)
            reply.raise_for_status()
            return int(reply.json()["usage"]["completion_tokens"])

        return sum(await asyncio.gather(*(one(text) for text in texts)))


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", timeout=5).status_code < 500:
                return
        time.sleep(0.2)
    raise RuntimeError(log.read_text(errors="replace")[-3000:])


def _listener(url: str) -> psutil.Process:
    port = int(url.rsplit(":", 1)[1])
    for found in psutil.net_connections("tcp"):
        if found.laddr and found.laddr.port == port and found.status == "LISTEN" and found.pid:
            return psutil.Process(found.pid)
    raise RuntimeError(f"nobody listens on {port}")


def _cpu(process: psutil.Process) -> float:
    family = [process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def ours(model: Path, precision: str, threads: int) -> list[str]:
    command = [sys.executable, "-m", "tunesmith.infer.server", "--model", str(model)]
    command += ["--model-name", "bench", "--port", "{port}"]
    return [*command, "--precision", precision, "--threads", str(threads)]


def theirs(python: str, model: Path, *, is_continuous: bool) -> list[str]:
    script = str(Path(python).with_name("transformers"))
    command = [script, "serve", str(model), "--host", "127.0.0.1", "--port", "{port}"]
    command += ["--device", "cpu", "--dtype", "float32"]
    return [*command, "--continuous-batching"] if is_continuous else command

"""The server as a process among others: few descriptors, and other ASGI servers around it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from api_fixtures import ASKED, make_workspace
from house import PATIENCE, QUICK, House, build
from servers import free_port


def test_with_few_descriptors_the_server_refuses_connections_and_recovers(tmp_path: Path) -> None:
    """Under `ulimit -n 64`, two hundred clients come."""
    house = build(tmp_path)
    command = [sys.executable, "-m", "tunesmith.cli", "api", "--no-worker", "--port", "0"]
    shell = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command]
    environment = os.environ | QUICK | {"TUNESMITH_WORKSPACE": str(tmp_path)}
    with (tmp_path / "server.log").open("ab") as log:
        house.process = subprocess.Popen(shell, env=environment, stdout=log, stderr=log)
    try:
        house.url = house._address()
        crowd = [ask_for_the_list(house) for _ in range(200)]
        statuses = [one.recv(12) for one in crowd]
        assert statuses.count(b"HTTP/1.1 200") >= 8
        assert set(statuses) == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
        for one in crowd:
            one.close()
        assert house.wait(lambda: house.submit())
        assert house.process.poll() is None
    finally:
        house.end()


def ask_for_the_list(house: House) -> socket.socket:
    host, port = house.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), PATIENCE)
    client.sendall(b"GET /jobs?limit=3 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return client


def test_importing_the_application_opens_nothing(tmp_path: Path) -> None:
    code = "from tunesmith.api.app import app; assert callable(app)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_of_another_server_share_one_database(
    tmp_path: Path, fresh_database: Callable[[], str]
) -> None:
    make_workspace(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tunesmith.api.app:app", "--workers", "2"]
    given = {"TUNESMITH_WORKSPACE": str(tmp_path), "TUNESMITH_DATABASE_URL": fresh_database()}
    with (tmp_path / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=os.environ | QUICK | given, stderr=log, stdout=log
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_for(lambda: is_ready(client))
        for number in range(8):  # each on a connection of its own
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                client.post("/train/sft", json=ASKED).raise_for_status()
                assert len(client.get("/jobs").json()) == number + 1
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(PATIENCE)


def is_ready(client: httpx2.Client) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return client.get("/health/ready").status_code == 200
    return False


def wait_for(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found

"""A receiver of webhooks: a real server that answers each path as it was told to."""

import ssl
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from servers import wait_for


@dataclass(frozen=True)
class Heard:
    path: str
    headers: dict[str, str]
    body: str

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass(frozen=True)
class Say:
    """How to answer once."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    endless: bool = False
    """The body never ends."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that has heard enough is part of the game."""


class Receiver:
    """`answers[path]` are said one after the other, then 200. A path in `holding` is not answered
    until it is let go."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.heard: list[Heard] = []
        self.answers: defaultdict[str, list[Say]] = defaultdict(list)
        self.holding: set[str] = set()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def at(self, path: str) -> list[Heard]:
        with self.lock:
            return [one for one in self.heard if one.path == path]

    def wait(self, path: str, count: int = 1) -> list[Heard]:
        wait_for(lambda: len(self.at(path)) >= count, f"{count} messages at {path}")
        return self.at(path)

    def close(self) -> None:
        self.holding.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            headers = {name.lower(): value for name, value in self.headers.items()}
            with receiver.lock:
                receiver.heard.append(Heard(self.path, headers, body))
                said = receiver.answers[self.path]
                say = said.pop(0) if said else Say()
            while self.path in receiver.holding:
                time.sleep(0.01)
            self._answer(say)

        def _answer(self, say: Say) -> None:
            self.send_response(say.status)
            for name, value in say.headers.items():
                self.send_header(name, value)
            if not say.endless:
                self.send_header("Content-Length", str(len(say.body)))
            self.end_headers()
            self.wfile.write(say.body)
            while say.endless:
                self.wfile.write(b"x" * 65_536)

    return Handler

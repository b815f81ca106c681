"""A server on loopback that behaves as a test tells it to: it answers, breaks off, goes silent."""

import json
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Wire:
    """The answers to come, for each `METHOD /path`, in order; the last one stays."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    answers: dict[str, deque[Answer]] = field(default_factory=lambda: defaultdict(deque))

    def on(self, route: str, *answers: Answer) -> None:
        self.answers[route].extend(answers)

    def of(self, route: str) -> list[Asked]:
        return [one for one in self.asked if f"{one.method} {one.path.partition('?')[0]}" == route]


def reply(body: Any = None, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """JSON, or text and bytes as they are."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        is_raw = isinstance(body, bytes)
        content = body if is_raw else b"" if body is None else json.dumps(body).encode()
        handler.send_response(status)
        kinds = {"Content-Type": "text/html" if is_raw else "application/json"}
        for name, value in {
            **kinds,
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Hang up without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def stream(*parts: str, is_cut: bool = False) -> Answer:
    """Server-sent events as written; `is_cut` breaks the connection in the middle."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in parts:
            block = part.encode()
            handler.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
        if is_cut:
            drop(handler)
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def event(seq: int, kind: str = "step", **data: Any) -> str:
    body = {"job_id": "a1b2c3d4", "seq": seq, "fence": 1, "at": 1.5, "type": kind, "data": data}
    return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


def job(status: str = "running", **over: Any) -> dict[str, Any]:
    is_over = status in {"completed", "failed", "cancelled"}
    return {
        "job_id": "a1b2c3d4",
        "training_type": "sft",
        "status": status,
        "config": {"model_name": "팀/base"},
        "created_at": "2026-01-01T10:00:00",
        "started_at": "2026-01-01T10:00:05",
        "completed_at": "2026-01-01T10:01:07" if is_over else None,
        "error": None,
        "log_file": "outputs/training_logs/job_a1b2c3d4.log",
        "output_dir": "outputs/a1b2c3d4",
        "progress": 1.0 if is_over else 0.5,
        "metrics": {"loss": 0.25},
        "eta_seconds": None,
        **over,
    }


@contextmanager
def serving() -> Iterator[Wire]:
    wire = Wire()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *parts: Any) -> None:
            pass

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            wire.asked.append(Asked(self.command, self.path, headers, self.rfile.read(length)))
            waiting = wire.answers[f"{self.command} {self.path.partition('?')[0]}"]
            answer = waiting.popleft() if len(waiting) > 1 else waiting[0] if waiting else None
            (answer or reply({"detail": "no such route"}, 404))(self)

        do_POST = do_DELETE = do_GET

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """The client hung up: that is what some tests are about."""

    with Server(("127.0.0.1", 0), Handler) as server:
        wire.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield wire
        finally:
            server.shutdown()
            thread.join()

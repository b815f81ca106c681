"""A hub of the test's own: the real one's wire on loopback, with faults to order."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LARGE_BYTES = 4096
"""Files from here on are told with their SHA-256, as large ones are."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in mid-download is part of the game."""


@dataclass
class Repo:
    """A data set's is added as `datasets/<name>`."""

    folder: Path
    commit: str
    cuts: int = 0
    """So often the connection ends halfway through the weights."""
    status: int = 200
    """What its weights are answered with."""
    gate: str = ""
    """The token that its files want."""
    answered: threading.Event = field(default_factory=threading.Event)
    """Clear it to hold the weights back."""


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of every request."""

    def __post_init__(self) -> None:
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, folder: Path, **faults: Any) -> Repo:
        commit = hashlib.sha1(name.encode()).hexdigest()
        repo = self.repos[name] = Repo(folder, commit, **faults)
        repo.answered.set()
        return repo

    def fetched(self, name: str, file: str) -> list[str]:
        """The ranges that were asked of a file, one for each GET."""
        ending = f"/{name}/resolve/{self.repos[name].commit}/{file}"
        return [span for method, path, span in self.asked if method == "GET" and path == ending]

    def close(self) -> None:
        for repo in self.repos.values():
            repo.answered.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        house = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    house: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.house.asked.append((self.command, path, self.headers.get("Range", "")))
        name, word, rest = _split(path.removeprefix("/api").removeprefix("/models")[1:])
        repo = self.house.repos.get(name)
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif word == "resolve":
            self._file(repo, rest.partition("/")[2])
        elif rest not in ("", repo.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            self._json(_tree(repo) if word == "tree" else _info(name, repo))

    def _file(self, repo: Repo, name: str) -> None:
        path = repo.folder / name
        if repo.gate and self.headers.get("Authorization") != f"Bearer {repo.gate}":
            return self._refuse(403, "GatedRepo")
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        body, is_weights = path.read_bytes(), name.endswith((".safetensors", "slow.jsonl"))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        is_get = self.command == "GET"
        if is_get and is_weights:
            repo.answered.wait(60)
            if repo.status != 200:
                return self._refuse(repo.status, "")
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if is_get and is_weights and repo.cuts > 0:
            repo.cuts -= 1
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.close_connection = True
        elif is_get:
            self.wfile.write(body[start:])
        return None

    def _json(self, found: Any) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _split(path: str) -> tuple[str, str, str]:
    """Repository, what is asked of it, and the rest."""
    for word in ("resolve", "revision", "tree"):
        name, found, rest = path.partition(f"/{word}/")
        if found:
            return name, word, rest
    return path, "", ""


def _info(name: str, repo: Repo) -> dict[str, Any]:
    siblings = []
    for path in _files(repo):
        body = path.read_bytes()
        name_there = path.relative_to(repo.folder).as_posix()
        entry: dict[str, Any] = {"rfilename": name_there, "size": len(body), "blobId": "0" * 40}
        if len(body) >= LARGE_BYTES:
            sha256 = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": 130}
        siblings.append(entry)
    return {"id": name, "sha": repo.commit, "siblings": siblings, "private": False}


def _tree(repo: Repo) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
        for path in _files(repo)
    ]


def _files(repo: Repo) -> list[Path]:
    return sorted(path for path in repo.folder.rglob("*") if path.is_file())

"""A job that a worker of another host has claimed, and what that worker does, step by step."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from api_fixtures import ASKED, hub_of
from tunesmith import manifest
from tunesmith.spec.transfer import PIECE_BYTES

GIB = 1 << 30


class Attempt:
    """The worker's side of it, with its token."""

    def __init__(self, door: TestClient, name: str = "far", **asked: Any) -> None:
        self.door = door
        self.hub = hub_of(door)
        self.key = self.hub.make_key("hosts", is_worker=True)["key"]
        self.name = name
        self.job_id = door.post("/train/sft", json={**ASKED, **asked}).json()["job_id"]
        self.claim()

    def claim(self) -> None:
        ask = {
            "worker_id": self.name,
            "claim_id": hashlib.sha256(f"{self.job_id}{self.name}".encode()).hexdigest(),
            "capacity": {
                **{"slots": 1, "max_slots": 1},
                **{"memory_bytes": 64 * GIB, "max_memory_bytes": 64 * GIB},
            },
            "house_id": "",
            "wait_seconds": 30,
        }
        reply = self.door.post("/internal/v1/work", json=ask, headers=bearer(self.key))
        self.given = reply.json()["attempt"]
        assert self.given["is_remote"], reply.text
        self.fence, self.token = self.given["fence"], self.given["token"]

    @property
    def url(self) -> str:
        return f"/internal/v1/attempts/{self.job_id}/{self.fence}"

    @property
    def folder(self) -> Path:
        return Path(self.given["attempt_dir"])

    def get(self, path: str, **headers: str) -> Any:
        return self.door.get(f"{self.url}/{path}", headers={**bearer(self.token), **headers})

    def post(self, path: str, body: Any = None) -> Any:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return self.door.post(f"{self.url}/{path}", headers=bearer(self.token), **content)

    def put(self, path: str, body: bytes, digest: bytes | None = None) -> Any:
        told = base64.b64encode(digest or hashlib.sha256(body).digest()).decode()
        headers = {**bearer(self.token), "Content-Digest": f"sha-256=:{told}:"}
        return self.door.put(f"{self.url}/{path}", content=body, headers=headers)

    def send(self, folder: Path, **told: Any) -> str:
        """A whole sealed folder; returns what the API calls it."""
        body = offer(folder, **told)
        sha256 = hashlib.sha256(body["manifest"].encode()).hexdigest()
        missing = self.post("uploads", body).json()["missing"]
        for index, piece in zip(missing, pieces(folder), strict=True):
            assert self.put(f"uploads/{sha256}/{index}", piece).status_code == 204
        done = self.post(f"uploads/{sha256}/commit")
        assert done.status_code == 200, done.text
        return str(done.json()["path"])

    def report(self, *events: dict[str, Any], first: int = 1) -> Any:
        said = [{"n": first + at, "event": event} for at, event in enumerate(events)]
        return self.post("report", {"worker_id": self.name, "events": said})


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def sealed(folder: Path, kind: str = "checkpoint", /, **files: bytes) -> Path:
    for name, body in (files or {"a.bin": b"0" * 100, "b": b""}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    manifest.seal(folder, kind, {"step": 5})
    return folder


def offer(folder: Path, kind: str = "checkpoint", step: int = 5) -> dict[str, Any]:
    return {"kind": kind, "step": step, "manifest": (folder / "manifest.json").read_text()}


def pieces(folder: Path) -> list[bytes]:
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    bodies = [(folder / entry["path"]).read_bytes() for entry in listed]
    return [
        body[at : at + PIECE_BYTES] for body in bodies for at in range(0, len(body), PIECE_BYTES)
    ]


def checkpointed(path: str, folder: Path, step: int = 5) -> dict[str, Any]:
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    told = {"type": "checkpointed", "step": step, "path": path}
    return {**told, "manifest_sha256": digest, "size_bytes": 100}

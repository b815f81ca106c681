"""A worker that trains nothing: it says what it is told to, by the real worker protocol."""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

NOTE = {"type": "notice", "code": "note"}
STARTED = {
    "type": "started",
    "pid": 1,
    "plan": {"threads": 1},
    "total_steps": 1000,
    "parameters": 1,
    "trainable_parameters": 1,
}
WHOLE = {"slots": 8, "memory_bytes": 1 << 40, "max_slots": 8, "max_memory_bytes": 1 << 40}


class Unavailable(Exception):
    """The server said so (5xx)."""


@dataclass
class Hand:
    """Holds one attempt. `url` may be changed: another API of the same house goes on."""

    workspace: Path
    url: str
    attempt: dict[str, Any] = field(default_factory=dict)
    worker_id: str = "hand"
    boot_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    said: int = 0
    """Events so far that were taken."""

    def __post_init__(self) -> None:
        self.client = httpx2.Client(timeout=60, trust_env=False)
        self.token = (self.workspace / ".tunesmith" / "worker.token").read_text().strip()

    def close(self) -> None:
        self.client.close()

    def claim(self, tries: int = 20) -> str:
        """Wait for a job and take it. Returns its id."""
        ask = {"worker_id": self.worker_id, "boot_id": self.boot_id, "capacity": WHOLE}
        for _ in range(tries):
            reply = self._post("/work", ask | {"claim_id": uuid.uuid4().hex, "wait_seconds": 10})
            if reply.get("attempt"):
                self.attempt, self.said = reply["attempt"], 0
                self.say(STARTED)
                return str(self.attempt["job_id"])
        raise AssertionError("no job came")

    def say(self, *events: dict[str, Any]) -> None:
        """One report, one commit."""
        first = self.said + 1
        said = [{"n": n, "event": event} for n, event in enumerate(events, first)]
        self._attempt("report", {"worker_id": self.worker_id, "events": said})
        self.said += len(events)

    def note(self, text: str, **detail: Any) -> None:
        self.say(NOTE | {"message": text, "detail": detail})

    def end(self) -> None:
        """The job fails, for a reason that is not tried again."""
        outcome = {"kind": "failed", "failure_class": "user_error", "message": "끝 🎉"}
        self._attempt("finish", outcome)

    def _attempt(self, route: str, body: dict[str, Any]) -> None:
        path = f"/attempts/{self.attempt['job_id']}/{self.attempt['fence']}/{route}"
        self._post(path, body, self.attempt["token"])

    def _post(self, path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
        reply = self.client.post(
            f"{self.url}/internal/v1{path}",
            content=json.dumps(body),
            headers={
                "Authorization": f"Bearer {token or self.token}",
                "Content-Type": "application/json",
            },
        )
        if reply.status_code >= 500:
            raise Unavailable(reply.text)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

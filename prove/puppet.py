"""A worker played by hand: it speaks the workers' protocol, and trains nothing."""

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx2

PLAN = {"threads": 1, "device": "cpu", "precision": "fp32", "micro_batch_tokens": 64}
CAPACITY = {
    "slots": 1,
    "gpus": [],
    "memory_bytes": 1 << 40,
    "max_slots": 1,
    "max_gpus": 0,
    "max_memory_bytes": 1 << 40,
}
STEPS = 3
Told = Callable[[str, str], None]
"""Called with a job and where it is: claim, start, step, finish."""


class Fenced(Exception):
    """Another attempt owns the job, or it is over."""


class Puppet:
    """Claims jobs and carries them to an end, one after the other, until it is closed."""

    def __init__(self, url: str, token: str, number: int, dice: Random, told: Told) -> None:
        self._id = f"puppet-{number}"
        self._boot = uuid.uuid4().hex
        self._token, self._dice, self._told = token, dice, told
        self._http = httpx2.Client(base_url=url + "/internal/v1", timeout=60, trust_env=False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self.failure: Exception | None = None
        self.fenced = 0
        self.promoted = 0
        """Successes that it told, and that were taken."""
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(60)
        self._http.close()

    def _live(self) -> None:
        try:
            while not self._closing.is_set():
                job = self._claim()
                if job is not None:
                    self._carry_out(job)
        except Exception as error:
            self.failure = error

    def _claim(self) -> dict[str, Any] | None:
        ask = {
            "worker_id": self._id,
            "boot_id": self._boot,
            "claim_id": uuid.uuid4().hex,
            "capacity": CAPACITY,
            "wait_seconds": 1,
        }
        found = self._post("/work", ask, self._token).get("attempt")
        return dict(found) if found else None

    def _carry_out(self, job: dict[str, Any]) -> None:
        attempt = Attempt(self, job)
        self._told(job["job_id"], "claim")
        try:
            attempt.run(self._dice, self._told)
        except Fenced:
            self.fenced += 1

    def _post(self, path: str, body: Any, token: str) -> dict[str, Any]:
        reply = self._http.post(path, json=body, headers={"Authorization": f"Bearer {token}"})
        if reply.status_code == 409 and reply.json()["error"]["code"] == "fenced":
            raise Fenced(path)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text}"
        return dict(reply.json())

    def post(self, path: str, body: Any, token: str) -> dict[str, Any]:
        return self._post(path, body, token)

    @property
    def worker_id(self) -> str:
        return self._id


class Attempt:
    """One assignment. It obeys orders as a real trainer does: late, or never, where it is done."""

    def __init__(self, puppet: Puppet, job: dict[str, Any]) -> None:
        self._puppet, self._job = puppet, job
        self._path = f"/attempts/{job['job_id']}/{job['fence']}"
        self._n = int(job["first_event_n"]) - 1
        self._must_stop = False

    def run(self, dice: Random, told: Told) -> None:
        job_id = self._job["job_id"]
        told(job_id, "start")
        self._report(type="started", pid=1, plan=PLAN, total_steps=STEPS, **_SIZES)
        for step in range(1, STEPS + 1):
            if self._must_stop and dice.random() < 0.7:
                self._finish({"kind": "stopped", "step": step - 1})
                return
            told(job_id, "step")
            self._report(type="step", step=step, total_steps=STEPS, **_FIGURES)
            time.sleep(dice.uniform(0, 0.01))
        sealed = self._make_artifact()
        told(job_id, "finish")
        self._finish({"kind": "succeeded", "step": STEPS, **sealed})
        self._puppet.promoted += 1

    def _report(self, **event: Any) -> None:
        self._n += 1
        body = {"worker_id": self._puppet.worker_id, "events": [{"n": self._n, "event": event}]}
        orders = self._puppet.post(self._path + "/report", body, self._job["token"])
        self._must_stop = orders["stop"] is not None

    def _finish(self, outcome: dict[str, Any]) -> None:
        self._puppet.post(self._path + "/finish", outcome, self._job["token"])

    def _make_artifact(self) -> dict[str, str]:
        folder = Path(self._job["attempt_dir"], "artifact")
        folder.mkdir(parents=True)
        body = json.dumps({"job_id": self._job["job_id"]}).encode()
        (folder / "training.json").write_bytes(body)
        digest = hashlib.sha256(body).hexdigest()
        entry = {"path": "training.json", "size": len(body), "sha256": digest}
        manifest = json.dumps({"format": 1, "kind": "artifact", "files": [entry]}).encode()
        (folder / "manifest.json").write_bytes(manifest)
        sealed = hashlib.sha256(manifest).hexdigest()
        return {"artifact": str(folder), "manifest_sha256": sealed}


_SIZES = {"start_step": 0, "parameters": 1, "trainable_parameters": 1}
_FIGURES = {
    "epoch": 0.5,
    "loss": 1.0,
    "learning_rate": 0.1,
    "grad_norm": 1.0,
    "tokens": 1,
    "label_tokens": 1,
    "tokens_per_second": 1.0,
    "peak_memory_bytes": 1,
}

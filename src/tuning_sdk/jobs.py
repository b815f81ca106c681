"""Training jobs: start, look at, follow, stop."""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuning_sdk.errors import ConnectionError, TimeoutError, TuningAPIError
from tuning_sdk.events import EventLine, read_events
from tuning_sdk.models import CreatedJob, Estimate, Job, JobEvent, LogLines
from tuning_sdk.retry import PATIENCE, Call, should_retry_status, wait_seconds
from tuning_sdk.transport import Transport

_SILENCE_SECONDS = 60.0
"""Longer than the server's keep-alives are apart: a stream that says nothing is opened anew."""
_SERVERS_OWN = {"reset", "server_closing"}
"""Words on a stream that are no events of the job."""


class Jobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def train_sft(
        self,
        model_name: str,
        dataset_path: str | os.PathLike[str],
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> CreatedJob:
        """Start supervised fine-tuning; `fields` are those of POST /train/sft.

        The same `idempotency_key` makes the same job; without one, each call makes a job of its
        own, however often it is sent. Raises NotFoundError, ValidationError, ConflictError.
        """
        body = {"model_name": model_name, "dataset_path": os.fspath(dataset_path), **fields}
        return self._start("/train/sft", body, idempotency_key)

    def train_dpo(
        self,
        model_name: str,
        dataset_path: str | os.PathLike[str],
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> CreatedJob:
        """Start preference training on prompt, chosen and rejected; `fields` are those of POST
        /train/dpo. `model_name` may be the output folder of an earlier job. See `train_sft`.
        """
        body = {"model_name": model_name, "dataset_path": os.fspath(dataset_path), **fields}
        return self._start("/train/dpo", body, idempotency_key)

    def estimate_sft(
        self, model_name: str, dataset_path: str | os.PathLike[str], **fields: Any
    ) -> Estimate:
        """What `train_sft` with the same arguments would take; nothing is started."""
        return self._estimate("/train/sft/estimate", model_name, dataset_path, fields)

    def estimate_dpo(
        self, model_name: str, dataset_path: str | os.PathLike[str], **fields: Any
    ) -> Estimate:
        """What `train_dpo` with the same arguments would take; nothing is started."""
        return self._estimate("/train/dpo/estimate", model_name, dataset_path, fields)

    def train_config(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        suffix: str | None = None,
        resume_from: str | None = None,
    ) -> CreatedJob:
        """Start what a configuration asks for: a YAML or JSON file here, or the same as a mapping.

        Its paths are those of the server's workspace. Raises FileNotFoundError, ValidationError
        (with line and key), and as `train_sft`.
        """
        if isinstance(config, Mapping):
            content = json.dumps(dict(config), allow_nan=False).encode()
        else:
            content = Path(config).read_bytes()
        call = Call(
            "POST",
            "/train/config",
            params={"priority": priority, "suffix": suffix, "resume_from": resume_from},
            headers={"Content-Type": "application/yaml"},
            idempotency_key=idempotency_key or str(uuid.uuid4()),
        )
        return CreatedJob.of(self._transport.send(call, lambda: nullcontext({"content": content})))

    def get(self, job_id: str) -> Job:
        return Job.of(self._transport.send(Call("GET", _path(job_id))))

    def list(
        self, status: str | None = None, limit: int | None = None, offset: int | None = None
    ) -> list[Job]:
        """Newest first; without `limit`, every job that the key may see."""
        params = {"status": status, "limit": limit, "offset": offset}
        answer = self._transport.send(Call("GET", "/jobs", params=params))
        return [Job.of(item) for item in answer]

    def cancel(self, job_id: str, *, force: bool = False) -> CreatedJob:
        """Stop at the next step with a checkpoint, or at once with `force`.

        Raises ConflictError where the job has ended.
        """
        call = Call(
            "POST",
            _path(job_id, "/cancel"),
            params={"force": "true"} if force else {},
            idempotency_key=str(uuid.uuid4()),
        )
        return CreatedJob.of(self._transport.send(call))

    def logs(self, job_id: str, tail: int = 100) -> LogLines:
        """The last `tail` lines; 0 for all."""
        call = Call("GET", _path(job_id, "/logs"), params={"tail": tail})
        return LogLines.of(self._transport.send(call))

    def follow_logs(self, job_id: str, tail: int = 100, poll_seconds: float = 1.0) -> Iterator[str]:
        """The last `tail` lines and then each new one, until the job has ended."""
        seen: int | None = None
        while True:
            job = self.get(job_id)
            lines = self.logs(job_id, tail)
            if seen is not None and lines.total_lines - seen > len(lines.logs):
                lines = self.logs(job_id, lines.total_lines - seen)
            if job.started_at is not None or job.is_terminal:
                first = lines.total_lines - len(lines.logs)
                skipped = max(0, (seen or 0) - first)
                yield from lines.logs[skipped:]
                seen, tail = lines.total_lines, 200
            if job.is_terminal:
                return
            self._transport.sleep(poll_seconds)

    def events(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """Each event after number `after`, once, in order, until the job has ended.

        A stream that breaks is opened again where it broke. A server that was restored from an
        older copy tells the job's story anew, from its beginning. Raises NotFoundError, and
        ConnectionError once the server stays away.
        """
        failures, patience, first = 0, self._transport.max_retries, after
        while True:
            try:
                for line in self._open_events(job_id, after):
                    patience = max(patience, PATIENCE)
                    if line.name == "reset" and after > first:
                        after = first = 0
                    if line.name in _SERVERS_OWN:
                        continue
                    event = JobEvent.of(line.data)
                    if event.seq <= after:
                        continue
                    after, failures = event.seq, 0
                    yield event
                    if event.is_terminal:
                        return
                if self.get(job_id).is_terminal:
                    return
                self._transport.sleep(wait_seconds(1))
            except TuningAPIError as error:
                failures += 1
                if not _is_passing(error) or failures > patience:
                    raise
                self._transport.sleep(wait_seconds(failures, getattr(error, "retry_after", None)))

    def wait(
        self,
        job_id: str,
        on_progress: Callable[[Job], None] | None = None,
        poll_interval: float = 1.0,
        timeout: float | None = None,
    ) -> Job:
        """The job, once it has ended, however it ended; `on_progress` sees each change.

        Raises TimeoutError after `timeout` seconds; the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        last: Job | None = None
        while True:
            job = self.get(job_id)
            if on_progress is not None and job != last:
                on_progress(job)
            last = job
            if job.is_terminal:
                return job
            if deadline is not None and time.monotonic() + poll_interval > deadline:
                raise TimeoutError(f"job {job_id} is still {job.status} after {timeout} seconds")
            self._transport.sleep(poll_interval)

    def _start(self, path: str, body: dict[str, Any], key: str | None) -> CreatedJob:
        key = key or str(uuid.uuid4())
        return CreatedJob.of(
            self._transport.send(Call("POST", path, json=body, idempotency_key=key))
        )

    def _estimate(
        self, path: str, model: str, dataset: str | os.PathLike[str], fields: dict[str, Any]
    ) -> Estimate:
        body = {"model_name": model, "dataset_path": os.fspath(dataset), **fields}
        return Estimate.of(self._transport.send(Call("POST", path, json=body)))

    def _open_events(self, job_id: str, after: int) -> Iterator[EventLine]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        call = Call("GET", _path(job_id, "/events"), headers=headers, read_seconds=_SILENCE_SECONDS)
        with self._transport.stream(call) as response:
            yield from read_events(response)


def _is_passing(error: TuningAPIError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or should_retry_status(
        error.status_code
    )


def _path(job_id: str, rest: str = "") -> str:
    if not job_id:
        raise ValueError("a job's id is needed, as GET /jobs lists them")
    return f"/jobs/{quote(job_id, safe='')}{rest}"

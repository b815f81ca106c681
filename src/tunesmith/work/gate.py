"""The gate that a model passes before it is promoted, in a process of its own on this host."""

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tunesmith.errors import FailureClass
from tunesmith.spec.parity import WITNESSED, Verdict
from tunesmith.spec.pipe import Notice, TrainerTask
from tunesmith.spec.records import Outcome
from tunesmith.work.fork import Child, Forker
from tunesmith.work.pump import Log, pump

log = logging.getLogger(__name__)
MODULE = "tunesmith.infer.gate"
SECONDS = 900.0
"""For it to say something; a large model is long in coming."""


@dataclass(frozen=True)
class Gate:
    forker: Forker
    task: TrainerTask
    environment: Mapping[str, str]
    device: str
    journal: Log

    def is_wanted(self, outcome: Outcome) -> bool:
        """Whether there is a model, and word of its trainer to compare it with."""
        witnessed = Path(self.task.attempt_dir) / WITNESSED
        return outcome.kind == "succeeded" and bool(outcome.artifact) and witnessed.is_dir()

    async def judge(self, outcome: Outcome) -> Notice:
        """What is said of it: `parity` where it passed or did not, by its level, or
        `not_compared`. Never raises."""
        assert outcome.artifact
        try:
            child = await self.forker.start(
                MODULE, self._arguments(outcome.artifact), dict(self.environment)
            )
            said = await self._hear(child)
            if "unheard" in said:
                return _not_compared(str(said["unheard"]))
            verdict = Verdict.model_validate(said["verdict"])
        except TimeoutError:
            return _not_compared(f"the gate said nothing for {SECONDS:.0f} s")
        except (OSError, ValidationError, KeyError) as error:
            log.error("job %s: the gate failed: %r", self.task.job_id, error)
            return _not_compared("the gate ended without a verdict; see the job's log")
        passed: Literal["info", "warning"] = "warning" if verdict.has_drifted else "info"
        return Notice(
            level=passed if verdict.has_passed else "error",
            code="parity",
            message=verdict.message,
            detail=verdict.model_dump(mode="json", exclude={"message"}),
        )

    def _arguments(self, artifact: str) -> list[str]:
        argv = ["--model", artifact, "--witnessed", f"{self.task.attempt_dir}/{WITNESSED}"]
        argv += ["--device", self.device, "--threads", self.environment.get("OMP_NUM_THREADS", "1")]
        base = self._base(Path(artifact))
        return argv if base is None else [*argv, "--base", base]

    def _base(self, artifact: Path) -> str | None:
        """Where an adapter's base lies here, where the result calls it by another name."""
        ours = {theirs: path for path, theirs in self.task.inputs.named.items()}
        try:
            config = json.loads((artifact / "adapter_config.json").read_bytes())
            return ours.get(str(config["base_model_name_or_path"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    async def _hear(self, child: Child) -> dict[str, Any]:
        """Its one line. Raises TimeoutError; KeyError, OSError where it said none."""
        logging_task = asyncio.create_task(pump(child.stderr, self.journal))
        try:
            child.stdin.close()
            line = await asyncio.wait_for(child.stdout.readline(), SECONDS)
            said = json.loads(line or b"{}")
        except ValueError as error:
            raise OSError(f"no verdict: {error}") from None
        finally:
            child.kill()
            child.close()
            logging_task.cancel()
            await asyncio.gather(logging_task, return_exceptions=True)
        return said if isinstance(said, dict) else {}


def failed(outcome: Outcome, notice: Notice, place: str) -> Outcome:
    """A model that did not pass: it is there, and keeps its files, but gets no name."""
    return Outcome(
        kind="failed",
        step=outcome.step,
        artifact=outcome.artifact,
        manifest_sha256=outcome.manifest_sha256,
        failure_class=FailureClass.PARITY,
        message=f"{notice.message}; the model is at {place}"[:8000],
    )


def _not_compared(why: str) -> Notice:
    message = f"the engine was not compared with the trainer: {why}"
    return Notice(level="warning", code="not_compared", message=message[:4000])

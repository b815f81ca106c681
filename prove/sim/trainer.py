"""An attempt in its worker's hands: what its trainer says, and how it ends."""

from dataclasses import dataclass, field
from typing import Any

from prove.sim.oracle import Attempt
from prove.sim.stage import Stage
from store_fixtures import SHA, checkpointed, started, step
from tunesmith.errors import FailureClass
from tunesmith.spec.hands import NumberedEvent
from tunesmith.spec.records import Outcome, StopMode

STEPS = 6


@dataclass
class Run:
    attempt: Attempt
    next_n: int
    at_step: int = 0
    spool: list[NumberedEvent] = field(default_factory=list)
    """Said, and not known to be stored."""
    words: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By number: what the server has not acknowledged yet, heard or not."""
    outcome: Outcome | None = None
    stop: StopMode | None = None
    is_stubborn: bool = False
    """Does not end when asked to."""

    def train(self, stage: Stage, mark: int, is_calm: bool) -> None:
        """A step; sometimes a checkpoint, an end, a failure."""
        if self.outcome is not None:
            return
        if self.stop is StopMode.FORCE or (self.stop is not None and not self.is_stubborn):
            self.outcome = Outcome(kind="stopped", step=self.at_step)
        elif self.at_step >= STEPS:
            self.outcome = self._success()
        elif not is_calm and stage.chance(0.04):
            kind = stage.random.choice(list(FailureClass))
            self.outcome = Outcome(kind="failed", failure_class=kind, message="💥")
        else:
            self._step(mark, stage.chance(0.25))

    def _success(self) -> Outcome:
        path = f"/ws/{self.attempt.job_id}/{self.attempt.fence}/artifact"
        return Outcome(kind="succeeded", step=self.at_step, artifact=path, manifest_sha256=SHA)

    def _step(self, mark: int, with_checkpoint: bool) -> None:
        """`mark` tells this word from every other."""
        if self.next_n == self.attempt.first_n:
            self._say(started())
        self.at_step += 1
        self._say(step(self.at_step, tokens=mark, total_steps=STEPS))
        if with_checkpoint:
            body = checkpointed(self.at_step, self.attempt.fence)
            path = f"/ws/{self.attempt.job_id}/{self.attempt.fence}/step-{self.at_step}"
            self._say({**body, "path": path})

    def _say(self, event: dict[str, Any]) -> None:
        self.spool.append(NumberedEvent(n=self.next_n, event=event))
        self.words[self.next_n] = event
        self.next_n += 1

    def forget(self, last_n: int) -> None:
        """The worker was told that all up to here is stored."""
        self.spool = [one for one in self.spool if one.n > last_n]

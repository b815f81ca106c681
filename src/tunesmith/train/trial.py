"""One configuration of several: a training as it would be alone, but that others step it."""

import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import Evaluated, Notice, Step, TrainerEvent
from tunesmith.spec.sweep import ADAPTERS, TrialResult
from tunesmith.spec.train import Sweepable
from tunesmith.train import randomness
from tunesmith.train.batches import Source
from tunesmith.train.checkpoint import Saved, Snapshot
from tunesmith.train.job import Job
from tunesmith.train.loop import Loop
from tunesmith.train.methods import Method
from tunesmith.train.opened import Opened
from tunesmith.train.report import Report
from tunesmith.train.standing import Standing


@dataclass(frozen=True)
class Configuration:
    """What a trial is to be."""

    name: str
    spec: Sweepable
    """As if it were alone."""
    settings: dict[str, Any]
    """What it has otherwise than the others."""
    places: "array[int] | None" = None
    """The rows that are its own; None: all."""


_OWN = {"compared", "best_kept", "stopped_early", "update_skipped", "passes_halved"}
"""Notices that each trial has its own of."""


class Tally(Protocol):
    """What is counted over all trials."""

    @property
    def step(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def eta_seconds(self) -> float | None: ...


class Voice(Report):
    """A trial's way to the job's report: events bear its name, and count the steps of all."""

    def __init__(self, report: Report, name: str, tally: Tally, told: set[str]) -> None:
        """`told`: what was said already, and need not be said again by each trial."""
        self._report, self._name, self._tally, self._told = report, name, tally, told

    def send(self, event: TrainerEvent) -> None:
        match event:
            case Step() | Evaluated():
                mark = {"trial": self._name, "trial_step": event.step, "step": self._tally.step}
                event = event.model_copy(update=mark)
            case Notice() if event.code in _OWN:
                event = event.model_copy(update={"message": f"{self._name}: {event.message}"})
            case Notice() if event.message in self._told:
                return
            case Notice():
                self._told.add(event.message)
        if isinstance(event, Step):
            foretold = {
                "total_steps": max(self._tally.total_steps, event.step),
                "eta_seconds": self._tally.eta_seconds,
            }
            event = event.model_copy(update=foretold)
        self._report.send(event)


class TrialLoop(Loop):
    """Asks for checkpoints instead of writing them: one holds all trials."""

    wants_save = False

    def advance(self) -> bool:
        """A step, and what is due after it. False where a stop came before it."""
        if not self._step():
            return False
        self._position = self._feed.state()
        self._look_around()
        if self.is_done:
            self.settle()
        return True

    def snapshot(self) -> Snapshot:
        return self._snapshot()

    def told_saved(self) -> None:
        self.wants_save, self._saved_at = False, time.monotonic()

    def _save(self) -> None:
        self.wants_save = True


class TrialJob(Job):
    """A job whose inputs are open already, and that leaves its end to others."""

    loop_kind = TrialLoop
    sources: Sequence[Source[Any]] = ()
    """Of the training and of the validation set."""

    def begin(
        self, opened: Opened, standing: Standing, saved: Saved | None
    ) -> tuple[Method, TrialLoop]:
        """Raises Interrupted."""
        self._standing = standing
        method, evaluation = self._methods(opened, saved)
        self.sources = [one.source for one in (method, evaluation) if one is not None]
        self._before = self._compared(opened, evaluation, saved)
        loop = self._loop(opened, method, evaluation, self._before)
        assert isinstance(loop, TrialLoop)
        if saved is not None:
            loop.restore(saved)
        return method, loop

    def settle(self, loop: TrialLoop) -> None:
        """What follows the last step and its checkpoint. Raises Interrupted."""
        loop.settle()
        self._compare(self._before)

    @property
    def comparison(self) -> dict[str, float]:
        return self._comparison

    def end(self, opened: Opened, loop: TrialLoop, method: Method) -> dict[str, Any]:
        """What a finished job's record says."""
        if not loop.is_total_exact:
            self._tell_omissions(method)
        return self._record(opened, loop, method)


@dataclass
class Trial:
    """A configuration under way."""

    configuration: Configuration
    job: TrialJob
    opened: Opened
    method: Method
    loop: TrialLoop
    device: str
    failure: str | None = None
    """Why it goes no further, where it does not."""
    random: dict[str, Tensor] = field(default_factory=dict)
    """The state of its own random numbers, while others draw theirs."""

    @classmethod
    def begin(
        cls,
        made_of: Configuration,
        job: TrialJob,
        opened: Opened,
        standing: Standing,
        saved: Saved | None,
    ) -> "Trial":
        """As it begins alone, or where it was when `saved` was. Raises Interrupted."""
        randomness.seed_all(made_of.spec.optim.seed)
        method, loop = job.begin(opened, standing, saved)
        failure = None if saved is None else saved.state["failure"]
        device = standing.plan.device
        trial = cls(made_of, job, opened, method, loop, device, failure)
        trial.random = randomness.capture(device)
        return trial

    @property
    def name(self) -> str:
        return self.configuration.name

    @property
    def path(self) -> str:
        """Of its adapter, in artifacts and checkpoints."""
        return f"{ADAPTERS}/{self.name}"

    @property
    def is_live(self) -> bool:
        return self.failure is None and not self.loop.is_done

    @property
    def steps_left(self) -> int:
        return max(0, self.loop.total_steps - self.loop.counts.step) if self.is_live else 0

    def advance(self) -> bool:
        """A step with its own random numbers. False where a stop came before it.

        A loss that is no number any more is this trial's end, and no other's.
        """
        randomness.restore(self.random, self.device)
        try:
            return self.loop.advance()
        except JobFailure as failure:
            if failure.failure_class is not FailureClass.NAN_LOSS:
                raise
            self.failure = str(failure)
            return True
        finally:
            self.random = randomness.capture(self.device)

    def snapshot(self) -> Snapshot:
        kept = self.loop.snapshot()
        state = {**kept.state, "failure": self.failure}
        return Snapshot(kept.step, kept.save_model, kept.optimizer, self.random, state, kept.kept)

    def score(self) -> tuple[bool, float]:
        """Lower is better; a trial that has a number goes before one that has none."""
        counts = self.loop.counts
        found = counts.metrics.get("eval_loss", counts.loss)
        return (found is None or self.failure is not None, math.inf if found is None else found)

    def result(self) -> TrialResult:
        counts = self.loop.counts
        is_well = self.failure is None
        return TrialResult(
            name=self.name,
            settings=self.configuration.settings,
            status="succeeded" if is_well else "failed",
            error=None if self.failure is None else self.failure[:500],
            steps=counts.step,
            rows=len(self.opened.rows),
            loss=counts.loss,
            eval_loss=counts.metrics.get("eval_loss"),
            path=self.path if is_well else None,
        )

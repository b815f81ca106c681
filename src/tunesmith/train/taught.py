"""Reinforcement whose reward model is trained first, on the same rows, in the same attempt.

Two trainings, one after the other, each as it would be alone. Their steps are counted through:
checkpoints of the first hold the reward model, those of the second the policy, and the reward model
in a folder of its own, which the artifact has too. What the second one scores with is read from
such a folder in every case, so that an attempt that goes on computes the same bits.
"""

import gc
import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import (
    Checkpointed,
    Evaluated,
    Finished,
    Plan,
    Started,
    Step,
    Stopped,
    TrainerEvent,
    TrainerTask,
)
from tunesmith.spec.rewards import REWARD_MODEL
from tunesmith.spec.train import Reinforcing, reward_training
from tunesmith.train.artifact import RECORD
from tunesmith.train.checkpoint import Saved, Shelf, Snapshot
from tunesmith.train.job import Job
from tunesmith.train.loop import Loop
from tunesmith.train.methods import Method
from tunesmith.train.naming import name_base, place_base
from tunesmith.train.opened import Opened
from tunesmith.train.parallel import Group
from tunesmith.train.process import Asks
from tunesmith.train.report import Report
from tunesmith.train.rounds import steps_of
from tunesmith.train.sets import open_sets

_BEFORE = "steps_before"
"""In the state of the policy's checkpoints: the steps that its reward model took."""
_MODEL = "model"


class Voice(Report):
    """A part's way to the job's report: its steps are counted between those before and after."""

    def __init__(self, report: Report, before: int, after: int, name: str | None) -> None:
        """`after` is an estimate; events of steps bear the name, where there is one."""
        self._report, self._before, self._after, self._name = report, before, after, name

    def send(self, event: TrainerEvent) -> None:
        update: dict[str, object] = {}
        match event:
            case Step() | Evaluated():
                update = {"step": event.step + self._before}
                if self._name is not None:
                    update |= {"trial": self._name, "trial_step": event.step}
            case Started():
                update = {
                    "start_step": event.start_step + self._before,
                    "is_total_exact": event.is_total_exact and not self._after,
                }
            case Stopped() | Finished():
                update = {"step": event.step + self._before}
        if isinstance(event, Step | Started):
            update["total_steps"] = self._before + event.total_steps + self._after
        self._report.send(event.model_copy(update=update))


class Teaching(Job):
    """The first part: a reward model, left in a folder of the attempt."""

    steps: int | None = None
    """Once it is trained."""

    @property
    def plan(self) -> Plan:
        """As it stands, and as a later attempt is told: memory may have fallen short."""
        return self._plan

    def _finish(self, opened: Opened, loop: Loop, method: Method) -> None:
        if not loop.is_total_exact:
            self._tell_omissions(method)
        opened.model.gather()
        if self._group.is_first:
            folder = place_of(self._task)
            shutil.rmtree(folder, ignore_errors=True)
            opened.model.save(folder)
            opened.renderer.save(folder)
            record = json.dumps(self._record(opened, loop, method), indent=1, sort_keys=True)
            (folder / RECORD).write_text(record + "\n", encoding="utf-8")
        self.steps = loop.counts.step


class Taught(Job):
    """The second part: the policy, and beside it what rewards it."""

    def __init__(self, task: TrainerTask, report: Report, asks: Asks, group: Group) -> None:
        super().__init__(task, report, asks, group)
        self.steps_before = 0

    def learn(self, steps_before: int) -> None:
        """From the model in the attempt's folder."""
        self._taught, self.steps_before = place_of(self._task), steps_before
        self._report = Voice(self._report, steps_before, 0, None)
        self.run()

    def plan_for(self, saved: Saved | None) -> Plan:
        return self._agreed(self._choose_plan(saved))

    def _save_model(self, opened: Opened, folder: Path) -> None:
        super()._save_model(opened, folder)
        assert self._taught is not None
        shutil.copytree(self._taught, folder / REWARD_MODEL)
        name_base(folder / REWARD_MODEL, opened.named)

    def _shelf(self) -> Shelf:
        run = self._spec.run
        return TaughtShelf(Path(self._task.attempt_dir), run.keep_checkpoints, self.steps_before)


class TaughtShelf(Shelf):
    """Its checkpoints count the steps before, too, and remember them."""

    def __init__(self, attempt_dir: Path, keep: int, before: int) -> None:
        super().__init__(attempt_dir, keep)
        self._before = before

    def write(self, snapshot: Snapshot) -> Checkpointed:
        state = snapshot.state | {_BEFORE: self._before}
        return super().write(replace(snapshot, step=snapshot.step + self._before, state=state))


class TaughtJob(Job):
    """Carries out a task whose reward model is trained first."""

    def run(self) -> None:
        saved = None if self._task.resume_from is None else self._saved()
        policy = Taught(self._task, self._report, self._asks, self._group)
        task = self._task.model_copy(update={"plan": policy.plan_for(saved)})
        if self._task.is_probe:
            return policy.run()
        try:
            self._in_turn(task, saved)
        finally:
            if self._group.is_first:
                shutil.rmtree(place_of(task), ignore_errors=True)
        return None

    def _in_turn(self, task: TrainerTask, saved: Saved | None) -> None:
        steps = self._resumed(saved) if saved is not None else None
        if steps is None:
            teaching = self._teach(task)
            steps = teaching.steps
            task = task.model_copy(update={"resume_from": None, "plan": teaching.plan})
        if steps is None:
            return
        gc.collect()  # the first model, before there is a second
        Taught(task, self._report, self._asks, self._group).learn(steps)

    def _teach(self, task: TrainerTask) -> Teaching:
        """Has no steps where a stop came. Raises JobFailure(data_error) where rows are no pairs."""
        first = reward_training(task.spec)
        assert first is not None
        voice = Voice(self._report, 0, self._foretold(task), REWARD_MODEL)
        own = task.model_copy(update={"spec": first})
        teaching = Teaching(own, voice, self._asks, self._group)
        teaching.run()
        self._group.tell(b"it is there")  # all wait for it
        return teaching

    def _foretold(self, task: TrainerTask) -> int:
        """Steps of the policy, by the number of rows."""
        assert isinstance(task.spec, Reinforcing)
        with ExitStack() as files:
            rows, _ = open_sets(task.inputs, task.spec, files)
            a_round = task.spec.rollout_batch_size * self._group.size
            steps = steps_of(task.spec, len(rows), a_round, self._samples_a_step)
        optim = task.spec.optim
        total = max(1, math.ceil(round(optim.epochs * steps, 6)))
        return total if optim.max_steps is None else min(total, optim.max_steps)

    def _resumed(self, saved: Saved) -> int | None:
        """The steps before, with the reward model laid out; None where it is still in training."""
        before = saved.state.get(_BEFORE)
        if before is None and saved.state["spec"]["method"] != "reward":
            raise JobFailure(
                FailureClass.USER_ERROR,
                f"{saved.folder.name} is of a job that trained no reward model first",
                "resume with the rewards that the checkpoint was made with",
            )
        if before is None:
            return None
        if self._group.is_first:
            folder = place_of(self._task)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved.folder / _MODEL / REWARD_MODEL, folder)
            place_base(folder, self._task.inputs.named)
        self._group.tell(b"it is there")
        return int(before)


def place_of(task: TrainerTask) -> Path:
    """Where an attempt keeps the reward model that was trained."""
    return Path(task.attempt_dir) / REWARD_MODEL

"""Several trainings over one frozen base, stepped side by side in one process.

Source, objective, optimizer, schedule, order of rows and random numbers are those that each would
have alone; so are its losses, bit for bit. They take turns, a step each: on a CPU joining their
samples to one batch gains nothing, since activations then leave the cache; what is saved is all
starts but one, and all copies of the base but one.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.data.holdout import Part
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.language import Model, open_beside
from tunesmith.spec.pipe import Finished, Notice, Started, Stopped, TrainerTask
from tunesmith.spec.sweep import TABLE, SweepTable
from tunesmith.spec.train import Sft, Sweepable, reward_training
from tunesmith.train import space
from tunesmith.train.artifact import RECORD
from tunesmith.train.batches import Interrupted
from tunesmith.train.checkpoint import Saved, Snapshot, joined
from tunesmith.train.failure import is_disk_full
from tunesmith.train.groups import by_rows
from tunesmith.train.job import Job
from tunesmith.train.naming import name_base
from tunesmith.train.opened import Opened, Opener
from tunesmith.train.parallel import Group
from tunesmith.train.process import Asks
from tunesmith.train.report import Report
from tunesmith.train.source import RowSource
from tunesmith.train.taught import TaughtJob
from tunesmith.train.trial import Configuration, Trial, TrialJob, Voice


def job_for(task: TrainerTask, report: Report, asks: Asks, group: Group = Group()) -> Job:
    """What carries the task out: one training, or several, side by side or one for the other."""
    found = configurations(task)
    if found:
        return SweepJob(task, report, asks, found)
    if reward_training(task.spec) is not None:
        return TaughtJob(task, report, asks, group)
    return Job(task, report, asks, group)


def configurations(task: TrainerTask) -> list[Configuration]:
    """Empty where there is but one training. Raises JobFailure(data_error)."""
    spec = task.spec
    if isinstance(spec, Sft) and (found := by_rows(task, spec)):
        return found
    if not isinstance(spec, Sweepable) or spec.sweep is None:
        return []
    settings = spec.sweep.settings()
    return [Configuration(name, one, settings[name]) for name, one in spec.configurations().items()]


class SweepJob(Job):
    """Carries out a task that asks for several configurations."""

    has_trials = True

    def __init__(
        self, task: TrainerTask, report: Report, asks: Asks, made_of: Sequence[Configuration]
    ) -> None:
        super().__init__(task, report, asks)
        self._configurations = made_of
        self._trials: list[Trial] = []
        self._saved_step = -1

    @property
    def step(self) -> int:
        return sum(trial.loop.counts.step for trial in self._trials)

    @property
    def total_steps(self) -> int:
        return self.step + sum(trial.steps_left for trial in self._trials)

    @property
    def eta_seconds(self) -> float | None:
        live = [trial for trial in self._trials if trial.is_live]
        seconds = [trial.loop.counts.seconds_for(trial.steps_left) for trial in live]
        known = [one for one in seconds if one is not None]
        return round(sum(known), 3) if len(known) == len(seconds) else None

    def _open_model(self, opener: Opener) -> Model:
        opening = opener.opening()
        openings = [
            replace(opening, lora=one.spec.lora, seed=one.spec.optim.seed)
            for one in self._configurations
        ]
        self._models: Sequence[Model] = open_beside(self._task.inputs.model, openings)
        return self._models[0]

    def _carry_out(self, opened: Opened, saved: Saved | None) -> None:
        trained = (model.trainable().values() for model in self._models)
        self._wanted = space.Wanted.by(chain.from_iterable(trained))
        self._check_room()
        try:
            self._begin(opened, saved)
        except Interrupted:
            self._report.send(Stopped(step=saved.state["counts"]["step"] if saved else 0))
            return
        if self._task.is_probe or self._spec.run.probe:
            self._tell_probe(opened, self._trials[0].method)
        if self._task.is_probe:
            self._report.send(Stopped(step=0))
            return
        self._tell_start(opened)
        if self._take_turns():
            self._end(opened)
        else:
            self._report.send(Stopped(step=self.step))

    def _begin(self, opened: Opened, saved: Saved | None) -> None:
        told: set[str] = set()
        for one, model in zip(self._configurations, self._models, strict=True):
            task = self._task.model_copy(update={"spec": one.spec})
            job = TrialJob(task, Voice(self._report, one.name, self, told), self._asks)
            rows = opened.rows if one.places is None else Part(opened.rows, one.places)
            own = replace(opened, model=model, rows=rows)
            kept = None if saved is None else saved.of(one.name, f"adapters/{one.name}")
            self._trials.append(Trial.begin(one, job, own, self._standing, kept))
            self._share_samples(self._trials[0].job, job)
        self._saved_step = self.step if saved is not None else -1

    def _share_samples(self, first: TrialJob, other: TrialJob) -> None:
        """Rows are turned to tokens once, not for each trial."""
        for ours, theirs in zip(first.sources, other.sources, strict=True):
            if not isinstance(ours, RowSource) or not isinstance(theirs, RowSource):
                continue
            if ours is not theirs and ours.rows is theirs.rows:
                theirs.share(ours)

    def _take_turns(self) -> bool:
        """Train all to their ends, with a checkpoint there. False where a stop came before."""
        while live := [trial for trial in self._trials if trial.is_live]:
            for trial in live:
                if self._asks.should_stop or not trial.advance():
                    self._save()
                    return False
                if trial.failure is not None:
                    self._notice("trial_failed", f"{trial.name}: {trial.failure}")
            if any(trial.loop.wants_save for trial in self._trials):
                self._save()
        self._refuse_if_none_is_left()
        self._save()
        return self._settle()

    def _settle(self) -> bool:
        """Of each the weights that are to stay, and base against tuned. False where a stop came."""
        try:
            for trial in self._trials:
                if trial.failure is None:
                    trial.job.settle(trial.loop)
        except Interrupted:
            return False
        return True

    def _refuse_if_none_is_left(self) -> None:
        if all(trial.failure is not None for trial in self._trials):
            worst = self._trials[0]
            raise JobFailure(
                FailureClass.NAN_LOSS, f"no configuration is left: {worst.name}: {worst.failure}"
            )

    def _save(self) -> None:
        """A checkpoint of all trials. A full disk costs it, not the job."""
        for trial in self._trials:
            trial.loop.told_saved()
        if self.step in (0, self._saved_step):
            return
        try:
            shelf = self._shelf()
            self._report.send(shelf.write(self._snapshot()))
            shelf.thin()
            self._saved_step = self.step
        except Exception as error:
            if not is_disk_full(error):
                raise
            self._notice(
                "checkpoint_failed",
                f"step {self.step}: no space for a checkpoint; the older ones are kept",
            )

    def _snapshot(self) -> Snapshot:
        held = {trial.name: trial.snapshot() for trial in self._trials}
        return Snapshot(
            step=self.step,
            save_model=self._save_models,
            optimizer=joined({name: one.optimizer for name, one in held.items()}),
            random=joined({name: one.random for name, one in held.items()}),
            state={
                "trials": {name: one.state for name, one in held.items()},
                "counts": {"step": self.step},
                "plan": self._plan.model_dump(),
                "spec": self._spec.model_dump(mode="json"),
            },
            kept=joined({name: one.kept for name, one in held.items()}),
        )

    def _save_models(self, folder: Path) -> None:
        """The best by now as it is served, and each one's weights."""
        self._best().opened.save(folder)
        self._testify(self._best().opened, folder)
        for trial in self._trials:
            place = folder / trial.path
            trial.opened.model.save(place)
            name_base(place, trial.opened.named)

    def _best(self) -> Trial:
        return min(self._trials, key=Trial.score)

    def _tell_start(self, opened: Opened) -> None:
        trained = [
            sum(parameter.numel() for parameter in model.trainable().values())
            for model in self._models
        ]
        self._report.send(
            Started(
                pid=os.getpid(),
                plan=self._plan,
                total_steps=max(1, self.total_steps),
                is_total_exact=all(trial.loop.is_total_exact for trial in self._trials),
                start_step=self.step,
                parameters=self._models[0].parameters_total + sum(trained[1:]),
                trainable_parameters=sum(trained),
                detail={
                    "rows": len(opened.rows),
                    "format": opened.rows.format,
                    "max_length": opened.max_length,
                    "is_lean": self._models[0].is_lean,
                    "gradient_checkpointing": self._plan.gradient_checkpointing,
                    "template": opened.renderer.template_source,
                    "trials": [one.name for one in self._configurations],
                },
            )
        )

    def _end(self, opened: Opened) -> None:
        table, best = self._table(), self._best()
        records = {
            trial.name: trial.job.end(trial.opened, trial.loop, trial.method)
            for trial in self._trials
            if trial.failure is None
        }
        told = table.model_dump(mode="json")
        record = {**records[best.name], "sweep": told}
        path, digest = self._write_artifact(lambda folder: self._fill(folder, records), record)
        message = f"best of {len(self._trials)} configurations by {table.by}: {best.name}"
        self._report.send(Notice(level="info", code="sweep", message=message, detail=told))
        self._report.send(
            Finished(
                step=self.step,
                artifact=str(path),
                manifest_sha256=digest,
                metrics=best.job.comparison,
                detail={**record["metrics"], "omitted": record["omitted"], "best": best.name},
            )
        )

    def _fill(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        """The best one at the root, each by itself, and the table."""
        self._best().opened.save(folder)
        self._testify(self._best().opened, folder)
        for trial in self._trials:
            if trial.name in records:
                place = folder / trial.path
                trial.opened.save(place)
                self._testify(trial.opened, place, trial.path, trial.name)
                (place / RECORD).write_text(_lines(records[trial.name]), encoding="utf-8")
        table = self._table().model_dump(mode="json")
        (folder / TABLE).write_text(_lines(table), encoding="utf-8")

    def _table(self) -> SweepTable:
        results = tuple(trial.result() for trial in self._trials)
        by = "loss" if all(one.eval_loss is None for one in results) else "eval_loss"
        return SweepTable(best=self._best().name, by=by, trials=results)


def _lines(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True) + "\n"

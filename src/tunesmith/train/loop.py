"""The training loop: samples in, updates, events and checkpoints out, whatever the method."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.language import Model
from tunesmith.nn.shards import whole_on_first
from tunesmith.spec.pipe import Evaluated, Notice, Replanned, Step, TrainerEvent
from tunesmith.spec.train import TrainSpec
from tunesmith.train import randomness
from tunesmith.train.batches import Interrupted, Sized
from tunesmith.train.best import Watch
from tunesmith.train.checkpoint import Saved, Shelf, Snapshot
from tunesmith.train.counts import Counts
from tunesmith.train.evaluate import Evaluation
from tunesmith.train.failure import MAX_MESSAGE, is_disk_full, is_out_of_memory, judge
from tunesmith.train.memory import peak_bytes
from tunesmith.train.narrowing import free_memory, hopeless, may_narrow, narrow
from tunesmith.train.norms import adapter_norms
from tunesmith.train.objective import Objective, means
from tunesmith.train.optimizer import Optimizer
from tunesmith.train.parallel import Group
from tunesmith.train.process import Asks
from tunesmith.train.report import finite, finite_only
from tunesmith.train.scaling import LossScale
from tunesmith.train.schedule import learning_rate
from tunesmith.train.stages import Stages
from tunesmith.train.standing import Standing
from tunesmith.train.steps import Steps

BAD_STEPS = 3
"""In a row, without a finite loss and gradient, before a job is given up that may skip some."""
MAX_LINES = 20
"""Of a step, that are named."""


@dataclass(frozen=True)
class Pass:
    """What one step's passes over the model came to."""

    loss: float
    """Mean over the step's units: see `Objective`."""
    samples: int
    tokens: int
    labels: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Parts:
    """What a loop is put together from."""

    spec: TrainSpec
    standing: Standing
    model: Model
    objective: Objective[Any]
    feed: Steps[Any]
    evaluation: Evaluation | None
    watch: Watch | None
    """Over its evaluations."""
    baseline: Sequence[float]
    """Losses before the first update: see `comparison`."""
    kept: Mapping[str, Tensor]
    """Tensors that every checkpoint is to hold beside."""
    shelf: Shelf
    stages: Stages | None
    save_model: Callable[[Path], None]
    send: Callable[[TrainerEvent], None]
    asks: Asks
    group: Group
    after_first_epoch: Callable[[], None]


class Loop:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._run, self._optim = parts.spec.run, parts.spec.optim
        self._model, self._feed, self._group = parts.model, parts.feed, parts.group
        self._trained = {**parts.model.trainable(), **parts.objective.beside}
        self._optimizer = Optimizer(self._trained, parts.spec.optim)
        self._scale = LossScale.of(parts.standing.plan.precision)
        self.counts = Counts()
        self._mark()
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._untold = (0, 0.0)
        """Tokens and seconds since the last event."""

    @property
    def _device(self) -> str:
        return self._parts.standing.plan.device

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the job, by what is known of its rows."""
        total = max(1, math.ceil(round(self._optim.epochs * self._feed.steps_an_epoch, 6)))
        if not self.is_total_exact and self._optim.epochs >= 1 and self._feed.epoch == 0:
            total = max(total, self.counts.step + 1)
        return total if self._optim.max_steps is None else min(total, self._optim.max_steps)

    @property
    def is_total_exact(self) -> bool:
        return self._feed.epoch_samples is not None

    @property
    def is_done(self) -> bool:
        watch = self._parts.watch
        if watch is not None and watch.is_out_of_patience:
            return True
        return self.counts.step >= self.total_steps

    def restore(self, saved: Saved) -> None:
        """Go on where a checkpoint was taken. Raises JobFailure where it is another job's."""
        weights = saved.weights()
        own = self._model.weights()
        if {name: tensor.shape for name, tensor in weights.items()} != {
            name: tensor.shape for name, tensor in own.items()
        }:
            raise JobFailure(
                FailureClass.USER_ERROR,
                f"{saved.folder.name} holds other weights than this job trains",
                "resume with the model and the adapter settings the checkpoint was made with",
            )
        self._model.load_weights(weights)
        self._optimizer.restore(saved.optimizer)
        self.counts = Counts(**saved.state["counts"])
        if "loss_scale" in saved.state:
            self._scale = LossScale(**saved.state["loss_scale"])
        if self._parts.watch is not None and "best" in saved.state:
            self._parts.watch.restore(saved.state["best"], saved.kept)
        self._feed.seek(saved.state["feed"], saved.kept)
        self._mark()
        self._saved_step = self.counts.step
        randomness.restore(self._group.mine(saved.random), self._device)

    def run(self) -> bool:
        """Train to the end, with a checkpoint there. False where a stop was asked for before."""
        while not self.is_done:
            [should_stop] = self._group.any(self._parts.asks.should_stop)
            if should_stop or not self._step():
                self._save()
                return False
            self._mark()
            self._look_around()
        self._save()
        self.settle()
        return True

    def settle(self) -> None:
        """Put the weights in place that are to stay."""
        watch = self._parts.watch
        if watch is not None and watch.settle():
            self.counts.metrics = dict(watch.record.metrics)
            self._notice("best_kept", f"{watch.sentence()}: its weights are the result", "info")

    def _mark(self) -> None:
        """Where a checkpoint of now goes on from: a step that is broken off may take more."""
        self._position, self._kept = self._feed.state(), self._feed.kept()

    def _step(self) -> bool:
        """One update. False where a stop came before there was anything to train on."""
        began = time.monotonic()
        rate = learning_rate(self._optim, self.counts.step, self.total_steps)
        try:
            samples = self._feed.take()
        except Interrupted:
            return False
        done, norm = self._passed_and_updated(samples, rate)
        self._count(done, norm, time.monotonic() - began)
        self._tell(done, rate, norm)
        if not math.isfinite(norm):
            self._answer_bad_step(done.loss, norm)
        return True

    def _passed_and_updated(self, samples: Sequence[Sized], rate: float) -> tuple[Pass, float]:
        """What the passes came to and the gradient's norm; again from the beginning where memory
        does not suffice for a pass, or fp16 for the scale of the loss."""
        before = randomness.mark(self._device)
        while True:
            done = self._pass(samples)
            if isinstance(done, JobFailure):
                samples = self._narrow(samples, done, before)
                continue
            norm = self._update(done.loss, rate)
            if math.isfinite(norm):
                self._scale.count()
                return done, norm
            if not math.isfinite(done.loss) or not self._scale.lower():
                return done, norm
            randomness.rewind(before, self._device)

    def _pass(self, samples: Sequence[Sized]) -> Pass | JobFailure:
        """Forward and backward over a step's samples; each unit weighs the same.

        Returns what failed where that was memory, for any process; there are no gradients then.
        """
        objective = self._parts.objective
        fault, mine = None, (0.0,) * (1 + 2 * len(objective.names))
        try:
            mine = self._forward_backward(samples)
        except Exception as error:
            is_alone = may_narrow(self._parts.standing, self._group, objective)
            if not is_alone or not is_out_of_memory(error):
                raise
            fault = judge(error)
        mean, *numbers, faults = self._group.add_up(*mine, float(fault is not None))
        if faults:
            self._optimizer.drop_gradients()
            return fault or JobFailure(
                FailureClass.OOM_HOST, "memory did not suffice in another process of the job"
            )
        self._group.add_gradients(self._trained.values())
        return Pass(
            loss=mean,
            samples=len(samples),
            tokens=sum(sample.tokens for sample in samples),
            labels=sum(sample.labels for sample in samples),
            metrics=finite_only(objective.told(means(objective.names, numbers))),
        )

    def _forward_backward(self, samples: Sequence[Sized]) -> tuple[float, ...]:
        """This process's share: its part of the loss, and of the metrics' totals."""
        objective = self._parts.objective
        units = objective.units(samples)
        total: Tensor | float = 0.0
        totals_M2 = torch.zeros(len(objective.names), 2, dtype=torch.float64)
        for measured in objective.passes(samples):
            loss = measured.loss / units
            (loss * self._scale.value if self._scale.value != 1 else loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach().double()
            totals_M2 = totals_M2.to(measured.totals_M2.device) + measured.totals_M2
        return (float(total), *totals_M2.flatten().tolist())

    def _narrow(
        self, samples: Sequence[Sized], fault: JobFailure, before: dict[str, Tensor]
    ) -> Sequence[Sized]:
        """Everything as it was before the step, but for smaller passes, which are told of and kept
        before one counts. Raises `fault` where there are none."""
        free_memory()
        randomness.rewind(before, self._device)
        feed, standing = self._feed, self._parts.standing
        found = narrow(standing, self._group, samples, lambda: feed.lay_anew(samples))
        if found is None:
            raise hopeless(fault)
        self._parts.send(Replanned(plan=standing.plan))
        step = self.counts.step + 1
        message = f"step {step}: {fault}; {found.sentence}"
        self._notice("passes_halved", message[:MAX_MESSAGE], detail=found.detail)
        self._save()
        return found.samples

    def _update(self, loss: float, rate: float) -> float:
        """Returns the gradient's norm. No weight changes where it or the loss is not finite."""
        if not math.isfinite(loss):
            self._optimizer.drop_gradients()
            return math.nan
        return self._optimizer.update(rate, self._scale.value)

    def _count(self, done: Pass, norm: float, seconds: float) -> None:
        self.counts.samples += done.samples
        self.counts.tokens += done.tokens
        self.counts.label_tokens += done.labels
        limit = self._optim.max_grad_norm
        self.counts.clipped_steps += bool(limit) and math.isfinite(norm) and norm > limit
        self.counts.end_step(finite(done.loss), seconds, is_updated=math.isfinite(norm))
        self._untold = (self._untold[0] + done.tokens, self._untold[1] + seconds)

    def _answer_bad_step(self, loss: float, norm: float) -> None:
        """Of a step that changed no weight. Raises JobFailure(nan_loss) unless it is skipped."""
        self.counts.skipped_updates += 1
        lines = self._feed.lines(self._position)
        what = f"gradient's norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        told = f"step {self.counts.step}: the {what}, no finite number, over {_named(lines)}"
        if self._run.on_nan == "skip":
            if self.counts.bad_steps < BAD_STEPS:
                message = f"{told}; no weight was changed"
                self._notice("update_skipped", message, detail={"lines": lines[:MAX_LINES]})
                return
            told = f"{BAD_STEPS} steps in a row without a finite loss and gradient; {told}"
        raise JobFailure(
            FailureClass.NAN_LOSS,
            told,
            "look at those rows, lower the learning rate, or pass over such steps: on_nan: skip",
        )

    def _tell(self, done: Pass, rate: float, norm: float) -> None:
        step = self.counts.step
        if step != 1 and not self.is_done and step % self._run.logging_steps:
            return
        tokens, seconds = self._untold
        self._untold = (0, 0.0)
        self._parts.send(
            Step(
                step=step,
                total_steps=max(self.total_steps, step),
                epoch=round(self._feed.progress, 6),
                loss=finite(done.loss),
                learning_rate=rate,
                grad_norm=finite(norm),
                tokens=done.tokens,
                label_tokens=done.labels,
                tokens_per_second=round(tokens / max(seconds, 1e-9), 3),
                peak_memory_bytes=peak_bytes(self._device),
                cpu_seconds=round(time.process_time(), 3),
                eta_seconds=self.counts.seconds_for(self.total_steps - step),
                metrics=self._told() | done.metrics,
            )
        )

    def _told(self) -> dict[str, float]:
        """Beside what the objective tells."""
        norms = adapter_norms(self._model.trainable())
        share = {"clipped_share": self.counts.clipped_share}
        scale = {"loss_scale": self._scale.value} if self._scale.value != 1 else {}
        return finite_only({**self._feed.told, **norms, **share, **scale})

    def _look_around(self) -> None:
        """What is due between two steps: an evaluation, a checkpoint."""
        asks = self._parts.asks
        if self._feed.is_between_epochs and self._feed.epoch == 1:
            self._parts.after_first_epoch()
        if self._is_due(self._run.eval_steps) or self._feed.is_between_epochs or self.is_done:
            self._evaluate()
        is_time = time.monotonic() - self._saved_at >= self._run.save_seconds
        [is_wanted] = self._group.any(asks.should_checkpoint or is_time)
        if is_wanted or self._is_due(self._run.save_steps):
            asks.should_checkpoint = False
            self._save()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.counts.step % every == 0

    def _evaluate(self) -> None:
        evaluation, asks = self._parts.evaluation, self._parts.asks
        if evaluation is None:
            return
        self._model.eval()
        metrics = evaluation.metrics(
            self._group, lambda: asks.should_stop and self._group.size == 1
        )
        self._model.train()
        if metrics is not None:
            self.counts.metrics = metrics
            self._parts.send(Evaluated(step=self.counts.step, metrics=metrics))
            self._watch(metrics)

    def _watch(self, metrics: Mapping[str, float]) -> None:
        watch = self._parts.watch
        if watch is None:
            return
        watch.take(metrics, self.counts.step)
        if watch.is_out_of_patience:
            message = f"{watch.sentence()}, {watch.record.misses} evaluations ago: stopped early"
            self._notice("stopped_early", f"step {self.counts.step}: {message}", "info")

    def _save(self) -> None:
        """A checkpoint of the last whole step, once a step. A full disk costs it, not the job."""
        if self.counts.step in (0, self._saved_step):
            return
        snapshot = self._snapshot()
        try:
            if self._group.is_first:
                written = self._parts.shelf.write(snapshot)
                self._parts.send(written)
                if self._parts.stages is not None:
                    self._parts.stages.add(Path(written.path), written.step)
                self._parts.shelf.thin()
            self._saved_step = self.counts.step
        except Exception as error:
            if not is_disk_full(error) and not is_out_of_memory(error):
                raise
            lacks = "space" if is_disk_full(error) else "memory"
            self._notice(
                "checkpoint_failed",
                f"step {self.counts.step}: no {lacks} for a checkpoint; the older ones are kept",
            )
        self._saved_at = time.monotonic()

    def _snapshot(self) -> Snapshot:
        watch = self._parts.watch
        self._model.gather()
        return Snapshot(
            step=self.counts.step,
            save_model=self._parts.save_model,
            optimizer=self._whole(self._optimizer.state()),
            random=self._group.gather(randomness.capture(self._device)),
            state=self._state(),
            kept={**self._parts.kept, **self._kept, **self._whole(watch.kept() if watch else {})},
        )

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return whole_on_first(tensors, is_first=self._group.is_first)

    def _state(self) -> dict[str, Any]:
        return {
            "counts": asdict(self.counts),
            "feed": self._position,
            "plan": self._parts.standing.plan.model_dump(),
            "spec": self._parts.spec.model_dump(mode="json"),
            "loss_scale": asdict(self._scale),
            "baseline": list(self._parts.baseline),
            **({"best": self._parts.watch.state()} if self._parts.watch else {}),
        }

    def _notice(
        self,
        code: str,
        message: str,
        level: Literal["info", "warning"] = "warning",
        detail: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._parts.send(Notice(level=level, code=code, message=message, detail=dict(detail)))


def _named(lines: Sequence[int]) -> str:
    if not lines:
        return "rows whose lines are not known any more"
    shown = ", ".join(map(str, lines[:MAX_LINES]))
    rest = len(lines) - MAX_LINES
    return f"line{'s' * (len(lines) > 1)} {shown}" + (f" and {rest:,} more" if rest > 0 else "")

"""One training job from its task to its artifact."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.reading import Reading
from tunesmith.data.render import NOTICES, Renderer
from tunesmith.data.rows import RowFault, RowIndex
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.language import LanguageModel, open_model
from tunesmith.spec.pipe import Finished, Notice, Plan, Started, Stopped, TrainerTask
from tunesmith.spec.train import Lora, Sft
from tunesmith.train import artifact, checkpoint, plan, randomness, space
from tunesmith.train.batches import Feed, Interrupted, Source
from tunesmith.train.checkpoint import Saved, Shelf
from tunesmith.train.failure import is_disk_full
from tunesmith.train.loop import Loop, Parts
from tunesmith.train.naming import name_base
from tunesmith.train.omissions import Omissions
from tunesmith.train.parallel import Group
from tunesmith.train.pretrain import BlockSource
from tunesmith.train.process import Asks
from tunesmith.train.report import Report
from tunesmith.train.sft import Cut, RowSource, read_row


@dataclass(frozen=True)
class Opened:
    """A task's inputs, opened."""

    model: LanguageModel
    renderer: Renderer
    rows: RowIndex
    eval_rows: RowIndex | None
    max_length: int
    """Tokens of a sample: as asked for, or the model's context where that is shorter."""
    named: Mapping[str, str]
    """Published names of models, by path."""


class Job:
    """Carries out a task; everything it says goes to `report`."""

    def __init__(
        self, task: TrainerTask, report: Report, asks: Asks, group: Group = Group()
    ) -> None:
        self._task, self._spec, self._group = task, task.spec, group
        self._report, self._asks = report, asks
        self._lora: Lora | None = task.spec.lora if isinstance(task.spec, Sft) else None

    def run(self) -> None:
        """Raises JobFailure, and whatever else goes wrong, for the caller to report."""
        saved = self._saved()
        self._plan = self._choose_plan(saved)
        self._is_checkpointing = plan.needs_gradient_checkpointing(
            self._task, self._plan, self._lora
        )
        torch.set_num_threads(self._plan.threads)
        if self._plan.compile:
            compiled = Path(self._task.attempt_dir).absolute() / ".compiled"
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        randomness.seed_all(self._spec.optim.seed)
        with ExitStack() as files:
            self._carry_out(self._open(files), saved)

    def _carry_out(self, opened: Opened, saved: Saved | None) -> None:
        self._wanted = space.Wanted.by(opened.model.trainable().values())
        self._check_room()
        source = self._source(opened, opened.rows, self._spec.optim.seed)
        loop = self._loop(opened, source)
        if not self._group.is_first:  # another dropout than rank 0's
            randomness.seed_all(self._spec.optim.seed + self._group.rank)
        try:
            if saved is not None:
                loop.restore(saved)
            self._start(opened, loop)
            is_whole = loop.run()
        except Interrupted:
            is_whole = False
        if is_whole:
            self._finish(opened, loop, source)
        else:
            self._report.send(Stopped(step=loop.counts.step))

    def _check_room(self) -> None:
        folder = Path(self._task.attempt_dir)
        folder.mkdir(parents=True, exist_ok=True)
        warning = space.check(folder, self._wanted)
        if warning is not None:
            self._notice("disk_low", warning)

    def _saved(self) -> Saved | None:
        if self._task.resume_from is None:
            return None
        return checkpoint.read(Path(self._task.resume_from))

    def _choose_plan(self, saved: Saved | None) -> Plan:
        """The task's; else the checkpoint's, so that the same bits follow; else a new one."""
        if self._task.plan is not None:
            return self._task.plan
        if saved is not None:
            return Plan.model_validate(saved.state["plan"])
        return plan.choose(self._task, self._group.size)

    def _open(self, files: ExitStack) -> Opened:
        reading = Reading.of(self._spec)
        rows = files.enter_context(open_rows(self._task.inputs.dataset, reading))
        model = open_model(
            self._task.inputs.model,
            lora=self._lora,
            precision=self._plan.precision,
            device=self._plan.device,
            compile=self._plan.compile,
            seed=self._spec.optim.seed,
            gradient_checkpointing=self._is_checkpointing,
            quantization=self._spec.run.quantization,
            from_scratch=getattr(self._spec, "from_scratch", False),
        )
        held_out, evaluation = None, self._task.inputs.eval_dataset
        if evaluation is not None:
            held_out = files.enter_context(open_rows(evaluation, reading))
        return Opened(
            model=model,
            renderer=self._renderer(rows),
            rows=rows,
            eval_rows=held_out,
            max_length=self._max_length(model),
            named=self._task.inputs.named,
        )

    def _renderer(self, rows: RowIndex) -> Renderer:
        renderer = Renderer.load(Path(self._task.inputs.model))
        if renderer.template is not None or not isinstance(self._spec, Sft):
            return renderer
        if rows.format in ("prompt_completion", "text") and not read_row(rows, 0).messages:
            return renderer
        renderer = renderer.with_fallback(rows.format)
        self._notice(
            "template_chosen",
            f"the model has no chat template: the {renderer.template_source} one is used "
            "and kept with the result",
        )
        return renderer

    def _max_length(self, model: LanguageModel) -> int:
        spec = self._spec
        asked = spec.max_length if isinstance(spec, Sft) else spec.sequence_length
        if asked <= model.context_length:
            return asked
        self._notice(
            "max_length_lowered",
            f"samples of {asked:,} tokens were asked for; the model's context of "
            f"{model.context_length:,} holds",
        )
        return model.context_length

    def _source(self, opened: Opened, rows: RowIndex, seed: int | None) -> Source:
        def should_stop() -> bool:
            return self._asks.should_stop and self._group.size == 1

        if isinstance(self._spec, Sft):
            cut = Cut(opened.max_length, self._spec.overlong, self._spec.train_on)
            return RowSource(rows, opened.renderer, cut, seed, should_stop)
        return BlockSource(rows, opened.renderer, opened.max_length, seed, should_stop)

    def _loop(self, opened: Opened, source: Source) -> Loop:
        optim = self._spec.optim
        samples = optim.batch_size * optim.gradient_accumulation_steps * self._group.size
        evaluated = opened.eval_rows
        held_out = None if evaluated is None else self._source(opened, evaluated, None)
        return Loop(
            Parts(
                spec=self._spec,
                plan=self._plan,
                model=opened.model,
                feed=Feed(source, samples),
                evaluation=None if held_out is None else lambda: Feed(held_out, samples),
                shelf=self._shelf(),
                save_model=lambda folder: save_model(opened, folder),
                send=self._report.send,
                asks=self._asks,
                group=self._group,
                after_first_epoch=lambda: self._tell_omissions(source),
            )
        )

    def _start(self, opened: Opened, loop: Loop) -> None:
        self._report.send(
            Started(
                pid=os.getpid(),
                plan=self._plan,
                total_steps=max(loop.total_steps, loop.counts.step),
                is_total_exact=loop.is_total_exact,
                start_step=loop.counts.step,
                parameters=opened.model.parameters_total,
                trainable_parameters=sum(
                    parameter.numel() for parameter in opened.model.trainable().values()
                ),
                detail={
                    "rows": len(opened.rows),
                    "format": opened.rows.format,
                    "max_length": opened.max_length,
                    "is_lean": opened.model.is_lean,
                    "gradient_checkpointing": self._is_checkpointing,
                    "template": opened.renderer.template_source,
                },
            )
        )

    def _finish(self, opened: Opened, loop: Loop, source: Source) -> None:
        if not self._group.is_first:
            return
        if not loop.is_total_exact:
            self._tell_omissions(source)
        record = self._record(opened, loop, source)
        path, digest = self._write_artifact(opened, record)
        self._report.send(
            Finished(
                step=loop.counts.step,
                artifact=str(path),
                manifest_sha256=digest,
                detail={**record["metrics"], "omitted": record["omitted"]},
            )
        )

    def _write_artifact(self, opened: Opened, record: dict[str, Any]) -> tuple[Path, str]:
        """On a full disk, older checkpoints make room; the newest stays.

        Raises JobFailure(disk_full) where that is not enough.
        """
        attempt = Path(self._task.attempt_dir)
        for is_last_try in (False, True):
            try:
                return artifact.write(attempt, lambda folder: save_model(opened, folder), record)
            except Exception as error:
                if not is_disk_full(error):
                    raise
                if is_last_try or not self._shelf().thin(1):
                    raise space.full(attempt, self._wanted) from error
        raise AssertionError

    def _shelf(self) -> Shelf:
        return Shelf(Path(self._task.attempt_dir), self._spec.run.keep_checkpoints)

    def _record(self, opened: Opened, loop: Loop, source: Source) -> dict[str, Any]:
        counts = loop.counts
        return {
            "job_id": self._task.job_id,
            "spec": self._spec.model_dump(mode="json"),
            "plan": self._plan.model_dump(mode="json"),
            "base_model": self._task.inputs.name_of_model,
            "rows": len(opened.rows),
            "omitted": omissions_of(source).state(),
            "metrics": {
                "steps": counts.step,
                "samples": counts.samples,
                "tokens": counts.tokens,
                "label_tokens": counts.label_tokens,
                "skipped_updates": counts.skipped_updates,
                "loss": counts.loss,
                **counts.metrics,
            },
        }

    def _tell_omissions(self, source: Source) -> None:
        omissions = omissions_of(source)
        for notice in sorted(omissions.notices):
            self._notice(notice, NOTICES[notice])
        if not omissions.counts:
            return
        code = "rows_dropped" if omissions.dropped else "rows_truncated"
        self._notice(code, omissions.sentence(), omissions.state())

    def _notice(self, code: str, message: str, detail: dict[str, Any] | None = None) -> None:
        self._report.send(Notice(level="warning", code=code, message=message, detail=detail or {}))


def open_rows(path: str, reading: Reading = Reading()) -> RowIndex:
    """Raises JobFailure(data_error) that names the line."""
    try:
        rows = RowIndex.open(Path(path), reading)
    except RowFault as fault:
        raise JobFailure(FailureClass.DATA_ERROR, fault.message) from fault
    if not len(rows):
        raise JobFailure(FailureClass.DATA_ERROR, f"{Path(path).name} holds no row")
    return rows


def omissions_of(source: Source) -> Omissions:
    return source.omissions if isinstance(source, RowSource) else Omissions()


def save_model(opened: Opened, folder: Path) -> None:
    """Weights, tokenizer and the template in use: all that serving needs."""
    opened.model.save(folder)
    opened.renderer.save(folder)
    name_base(folder, opened.named)

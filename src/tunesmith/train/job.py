"""One training job from its task to its artifact."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from tunesmith.data.render import NOTICES
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.language import LanguageModel, Model
from tunesmith.spec.parity import WITNESSED
from tunesmith.spec.pipe import (
    Finished,
    Notice,
    Plan,
    Probed,
    Started,
    Stopped,
    TrainerTask,
)
from tunesmith.spec.rewards import RewardSource, TrainedModel
from tunesmith.spec.train import Kto, Pretrain, Reinforcing, Reward
from tunesmith.train import artifact, checkpoint, plan, randomness, space
from tunesmith.train.answers import CACHE_TOKENS, Exam, draw_questions
from tunesmith.train.batches import Feed, Interrupted
from tunesmith.train.best import Watch
from tunesmith.train.checkpoint import Saved, Shelf
from tunesmith.train.comparison import Compared, Pace, draw
from tunesmith.train.evaluate import Evaluation
from tunesmith.train.failure import is_disk_full, is_out_of_memory, judge
from tunesmith.train.loop import Loop, Parts
from tunesmith.train.methods import Data, Method, Stage, ready
from tunesmith.train.narrowing import free_memory, may_narrow
from tunesmith.train.objective import Ground
from tunesmith.train.omissions import Omissions
from tunesmith.train.opened import Opened, Opener
from tunesmith.train.parallel import Group
from tunesmith.train.probe import probe
from tunesmith.train.process import Asks
from tunesmith.train.report import Report
from tunesmith.train.rewarding import Rewarder
from tunesmith.train.rewards import TRAINED, Bench, open_rewarders
from tunesmith.train.rollout import Rollouts, Wish
from tunesmith.train.source import RowSource
from tunesmith.train.stages import Stages
from tunesmith.train.standing import Standing
from tunesmith.train.witness import Witness

TELL_SECONDS = 30.0
DRAWING_SECONDS = 300.0
"""Between two words that completions are being drawn: steps say more, where they come oftener."""


class Job:
    """Carries out a task; everything it says goes to `report`."""

    loop_kind: ClassVar[type[Loop]] = Loop
    has_trials: ClassVar[bool] = False

    def __init__(
        self, task: TrainerTask, report: Report, asks: Asks, group: Group = Group()
    ) -> None:
        self._task, self._spec, self._group = task, task.spec, group
        self._report, self._asks = report, asks
        self._told_at = time.monotonic()
        self._comparison: dict[str, float] = {}
        self._taught: Path | None = None
        """The reward model that was trained first."""

    def run(self) -> None:
        """Raises JobFailure, and whatever else goes wrong, for the caller to report."""
        saved = self._saved()
        self._standing = Standing(self._agreed(self._choose_plan(saved)))
        torch.set_num_threads(self._plan.threads)
        if self._plan.compile:
            compiled = Path(self._task.attempt_dir).absolute() / ".compiled"
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        randomness.seed_all(self._spec.optim.seed)
        with ExitStack() as files:
            self._carry_out(self._open(files), saved)

    @property
    def _plan(self) -> Plan:
        return self._standing.plan

    def _carry_out(self, opened: Opened, saved: Saved | None) -> None:
        self._wanted = space.Wanted.by(opened.model.trainable().values())
        self._check_room()
        randomness.seed_all(self._spec.optim.seed)
        try:
            method, evaluation = self._methods(opened, saved)
            compared = self._compared(opened, evaluation, saved)
        except Interrupted:
            self._report.send(Stopped(step=saved.state["counts"]["step"] if saved else 0))
            return
        if self._task.is_probe or self._spec.run.probe:
            self._tell_probe(opened, method)
        if self._task.is_probe:
            self._report.send(Stopped(step=0))
            return
        loop = self._loop(opened, method, evaluation, compared)
        if not self._group.is_first:  # another dropout than rank 0's
            randomness.seed_all(self._spec.optim.seed + self._group.rank)
        try:
            if saved is not None:
                loop.restore(saved)
                self._adopt_stages(saved)
            self._start(opened, loop)
            is_whole = loop.run()
            if is_whole:
                self._compare(compared)
        except Interrupted:
            is_whole = False
        if is_whole:
            self._finish(opened, loop, method)
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
        saved = checkpoint.read(Path(self._task.resume_from))
        if ("trials" in saved.state) != self.has_trials:
            raise JobFailure(
                FailureClass.USER_ERROR,
                f"{saved.folder.name} is of a job with {'one' if self.has_trials else 'several'} "
                f"configurations, and this one has {'several' if self.has_trials else 'one'}",
                "resume with the configurations that the checkpoint was made with",
            )
        return saved

    def _choose_plan(self, saved: Saved | None) -> Plan:
        """The task's; else the checkpoint's, so that the same bits follow; else a new one."""
        if self._task.plan is not None:
            return plan.settled(self._task, self._task.plan)
        if saved is not None:
            return plan.settled(self._task, Plan.model_validate(saved.state["plan"]))
        return plan.choose(self._task, self._group.size)

    def _agreed(self, chosen: Plan) -> Plan:
        """Rank 0's: what one process finds free, another may not."""
        return Plan.model_validate_json(self._group.tell(chosen.model_dump_json().encode()))

    def _open(self, files: ExitStack) -> Opened:
        opener = Opener(self._task, self._plan, self._report.send)
        return opener.open(files, lambda: self._open_model(opener))

    def _open_model(self, opener: Opener) -> Model:
        return opener.model()

    def _methods(self, opened: Opened, saved: Saved | None) -> tuple[Method, Method | None]:
        """Of the training and of the validation set."""
        stage = Stage(
            task=self._task,
            plan=self._plan,
            ground=Ground(opened.model, self._plan.device, self._standing, self._group),
            renderer=opened.renderer,
            max_length=opened.max_length,
            kept=saved.kept if saved is not None else {},
            should_stop=lambda: self._asks.should_stop and self._group.size == 1,
            tell=self._tell_measured,
            warn=self._notice,
            tell_drawing=self._tell_drawing,
            rewarder=self._rewarder(opened),
        )
        inputs = self._task.inputs
        rows = Data(opened.rows, inputs.dataset, self._spec.optim.seed, "train")
        method = ready(stage, rows)
        if opened.eval_rows is None:
            return method, None
        evaluation = inputs.eval_dataset or inputs.dataset
        return method, ready(stage, Data(opened.eval_rows, evaluation, None, "eval"))

    def _rewarder(self, opened: Opened) -> Rewarder | None:
        if not isinstance(self._spec, Reinforcing):
            return None
        folders = dict(self._task.inputs.reward_models)
        if self._taught is not None:
            folders[TRAINED] = str(self._taught)
        bench = Bench(
            folders,
            self._plan,
            opened.rows.format,
            self._notice,
            self._task.inputs.networks,
            cast(LanguageModel, opened.model),
            self._is_stopped_while_waiting,
        )
        return open_rewarders([one for one in self._spec.rewards if self._is_there(one)], bench)

    def _is_stopped_while_waiting(self) -> bool:
        self._tell_drawing()
        return self._asks.should_stop and self._group.size == 1

    def _is_there(self, source: RewardSource) -> bool:
        """But for what is yet to be trained, which a probe does without."""
        is_missing = isinstance(source, TrainedModel) and self._taught is None
        assert not is_missing or self._task.is_probe, "a reward model is trained first"
        return not is_missing

    def _tell_measured(self, done: int, steps: int) -> None:
        message = f"measured what the model says before it is trained: {done} of {steps} steps"
        self._tell_now_and_then("reference", message, is_last=done == steps)

    def _tell_compared(self, done: int, rows: int) -> None:
        message = f"measured the loss of {done} of {rows} held-out rows"
        self._tell_now_and_then("baseline", message, is_last=False)

    def _tell_drawing(self) -> None:
        if time.monotonic() - self._told_at >= DRAWING_SECONDS:
            self._tell_now_and_then("drawing", "completions are being drawn", is_last=False)

    def _tell_now_and_then(self, code: str, message: str, *, is_last: bool) -> None:
        """A server takes a trainer that says nothing for dead."""
        now = time.monotonic()
        if is_last or now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            self._report.send(Notice(level="info", code=code, message=message))

    @property
    def _samples_a_step(self) -> int:
        optim = self._spec.optim
        return optim.batch_size * optim.gradient_accumulation_steps * self._group.size

    def _tell_probe(self, opened: Opened, method: Method) -> None:
        """Where memory does not suffice, a job goes on: a step that needs it has smaller passes."""
        try:
            self._report.send(self._probe(opened, method))
        except Exception as error:
            may_go_on = may_narrow(self._standing, self._group, method.objective)
            if self._task.is_probe or not may_go_on or not is_out_of_memory(error):
                raise
            fault = judge(error)
        else:
            return
        free_memory()
        self._notice(
            "probe_failed",
            f"a step on the longest samples does not fit in passes of "
            f"{self._standing.micro_batch_tokens:,} tokens, which will be halved: {fault}",
        )

    def _probe(self, opened: Opened, method: Method) -> Probed:
        samples = self._samples_a_step
        source, objective = method.source, method.objective
        return probe(opened.model, source, objective, self._plan, samples, method.stand_ins)

    def _compared(
        self, opened: Opened, evaluation: Method | None, saved: Saved | None
    ) -> Compared | None:
        """Raises Interrupted at a stop while the model is measured as it begins."""
        rows = self._spec.run.compare_rows
        is_odd = isinstance(self._spec, Kto | Reinforcing)  # a row alone has no loss there
        if evaluation is None or not rows or is_odd or self._group.size > 1:
            return None
        pace = Pace(lambda: self._asks.should_stop, self._tell_compared)
        known = None if saved is None else saved.state.get("baseline", [])
        samples = draw(evaluation.source, rows, self._spec.optim.seed)
        return Compared.of(opened.model, evaluation.objective, samples, known, pace)

    def _compare(self, compared: Compared | None) -> None:
        found = None if compared is None else compared.found(self._spec.optim.seed)
        if found is not None:
            self._comparison = found.metrics()
            self._report.send(Notice(level="info", code="compared", message=found.sentence()))

    def _loop(
        self,
        opened: Opened,
        method: Method,
        evaluation: Method | None,
        compared: Compared | None = None,
    ) -> Loop:
        best = self._spec.run.best
        samples = self._samples_a_step
        held_out = None
        if evaluation is not None:
            source = evaluation.source
            exam = self._exam(opened)
            held_out = Evaluation(evaluation.objective, lambda: Feed(source, samples), exam)
        return self.loop_kind(
            Parts(
                spec=self._spec,
                standing=self._standing,
                model=opened.model,
                objective=method.objective,
                feed=method.feed(samples),
                evaluation=held_out,
                watch=None if best is None else Watch(best, opened.model),
                baseline=[] if compared is None else compared.before,
                kept={**method.kept, **(evaluation.kept if evaluation is not None else {})},
                shelf=self._shelf(),
                stages=self._stages(),
                save_model=lambda folder: self._save_model(opened, folder),
                send=self._report.send,
                asks=self._asks,
                group=self._group,
                after_first_epoch=lambda: self._tell_omissions(method),
            )
        )

    def _exam(self, opened: Opened) -> Exam | None:
        run, model = self._spec.run, opened.model
        if not run.generated_rows or opened.eval_rows is None:
            return None
        questions = draw_questions(
            opened.eval_rows,
            opened.renderer,
            run.generated_rows,
            opened.max_length,
            self._spec.optim.seed,
        )
        if not questions:
            self._notice("nothing_to_answer", "no held-out row has an answer: none is generated")
            return None
        rollouts = Rollouts(
            cast(LanguageModel, model), self._plan.device, CACHE_TOKENS, self._is_stopped_generating
        )
        return Exam(
            rollouts,
            Wish(run.generated_tokens, opened.renderer.stop_ids, temperature=0),
            opened.renderer,
            questions,
        )

    def _is_stopped_generating(self) -> bool:
        message = "held-out rows are being answered"
        self._tell_now_and_then("answering", message, is_last=False)
        return self._asks.should_stop and self._group.size == 1

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
                    "eval_rows": len(opened.eval_rows) if opened.eval_rows is not None else 0,
                    "format": opened.rows.format,
                    "max_length": opened.max_length,
                    "is_lean": opened.model.is_lean,
                    "gradient_checkpointing": self._plan.gradient_checkpointing,
                    "template": opened.renderer.template_source,
                },
            )
        )

    def _finish(self, opened: Opened, loop: Loop, method: Method) -> None:
        opened.model.gather()
        if not self._group.is_first:
            return
        if not loop.is_total_exact:
            self._tell_omissions(method)
        record = self._record(opened, loop, method)
        path, digest = self._write_artifact(lambda folder: self._save_all(opened, folder), record)
        self._report.send(
            Finished(
                step=loop.counts.step,
                artifact=str(path),
                manifest_sha256=digest,
                metrics=self._comparison,
                detail={**record["metrics"], "omitted": record["omitted"]},
            )
        )

    def _write_artifact(
        self, save: Callable[[Path], None], record: dict[str, Any]
    ) -> tuple[Path, str]:
        """On a full disk, older checkpoints make room; the newest stays.

        Raises JobFailure(disk_full) where that is not enough.
        """
        attempt = Path(self._task.attempt_dir)
        for is_last_try in (False, True):
            try:
                return artifact.write(attempt, save, record)
            except Exception as error:
                if not is_disk_full(error):
                    raise
                if is_last_try or not self._shelf().thin(1):
                    raise space.full(attempt, self._wanted) from error
        raise AssertionError

    def _save_model(self, opened: Opened, folder: Path) -> None:
        opened.save(folder)

    def _shelf(self) -> Shelf:
        return Shelf(Path(self._task.attempt_dir), self._spec.run.keep_checkpoints)

    def _save_all(self, opened: Opened, folder: Path) -> None:
        """The model, and those on the way; and what it says, for whoever will serve it."""
        self._save_model(opened, folder)
        self._testify(opened, folder)
        if (stages := self._stages()) is not None:
            stages.place(folder)

    def _testify(self, opened: Opened, saved: Path, model: str = ".", name: str = "model") -> None:
        """A model whose weights no process holds by itself says nothing, nor does one that only
        scores."""
        is_shared_out = self._plan.parallel == "fsdp" and self._group.size > 1
        if is_shared_out or isinstance(self._spec, Reward):
            return
        witness = Witness(
            model=cast(LanguageModel, opened.model),
            renderer=opened.renderer,
            rows=opened.eval_rows or opened.rows,
            precision=self._format(),
            device=self._plan.device,
            seed=self._spec.optim.seed,
            base_facts=opened.facts,
        )
        try:
            witness.write(Path(self._task.attempt_dir) / WITNESSED / f"{name}.json", saved, model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._notice("not_heard", f"memory did not suffice to hear the model: {judge(error)}")

    def _format(self) -> str:
        """What a comparison has to allow for: frozen weights of few bits, or half precision."""
        few = {"4bit": "4bit", "8bit": "int8"}.get(self._spec.run.quantization or "")
        is_on_gpu = self._plan.device.startswith("cuda")
        return few if few is not None and is_on_gpu else self._plan.precision

    def _stages(self) -> Stages | None:
        """Of the process that writes."""
        spec, every = self._spec, self._spec.run.save_steps
        if not isinstance(spec, Pretrain) or not spec.keep_stages or every is None:
            return None
        if not self._group.is_first:
            return None
        record = {
            "job_id": self._task.job_id,
            "spec": spec.model_dump(mode="json"),
            "base_model": self._task.inputs.name_of_model,
        }
        return Stages(Path(self._task.attempt_dir), every, spec.keep_stages, record)

    def _adopt_stages(self, saved: Saved) -> None:
        stages = self._stages()
        if stages is not None:
            stages.adopt(saved.folder, saved.state["counts"]["step"])

    def _record(self, opened: Opened, loop: Loop, method: Method) -> dict[str, Any]:
        counts = loop.counts
        return {
            "job_id": self._task.job_id,
            "spec": self._spec.model_dump(mode="json"),
            "plan": self._plan.model_dump(mode="json"),
            "base_model": self._task.inputs.name_of_model,
            "rows": len(opened.rows),
            "omitted": omissions_of(method).state(),
            "metrics": {
                "steps": counts.step,
                "samples": counts.samples,
                "tokens": counts.tokens,
                "label_tokens": counts.label_tokens,
                "skipped_updates": counts.skipped_updates,
                "clipped_share": counts.clipped_share,
                "loss": counts.loss,
                **counts.metrics,
                **self._comparison,
            },
        }

    def _tell_omissions(self, method: Method) -> None:
        omissions = omissions_of(method)
        for notice in sorted(omissions.notices):
            self._notice(notice, NOTICES[notice])
        if not omissions.counts:
            return
        code = "rows_dropped" if omissions.dropped else "rows_truncated"
        self._notice(code, omissions.sentence(), omissions.state())

    def _notice(self, code: str, message: str, detail: dict[str, Any] | None = None) -> None:
        self._report.send(Notice(level="warning", code=code, message=message, detail=detail or {}))


def omissions_of(method: Method) -> Omissions:
    source = method.source
    return source.omissions if isinstance(source, RowSource) else Omissions()

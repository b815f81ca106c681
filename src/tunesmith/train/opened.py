"""A task's inputs, opened: the model, its renderer, the rows."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.holdout import Rows
from tunesmith.data.parity import facts_of
from tunesmith.data.render import Renderer
from tunesmith.data.sampling import Chosen
from tunesmith.nn.folder import open_folder
from tunesmith.nn.language import Model, open_scorer, open_with
from tunesmith.nn.opening import Opening
from tunesmith.spec.pipe import Notice, Plan, TrainerTask
from tunesmith.spec.train import Pretrain, Reward, Sft
from tunesmith.train import foreign
from tunesmith.train.naming import name_base
from tunesmith.train.sets import open_sets
from tunesmith.train.source import read_row


@dataclass(frozen=True)
class Opened:
    model: Model
    renderer: Renderer
    rows: Rows
    eval_rows: Rows | None
    max_length: int
    """Tokens of a sample: as asked for, or the model's context where that is shorter."""
    named: Mapping[str, str]
    """Published names of models, by path."""
    has_own_tokenizer: bool = True
    """False: the renderer's was brought along, in place of the model's."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the base's configuration: see `data.parity`."""

    def save(self, folder: Path) -> None:
        """Weights, tokenizer and the template in use: all that serving needs."""
        self.model.save(folder)
        self.renderer.save(folder)
        name_base(folder, self.named)
        if not self.has_own_tokenizer:
            foreign.name_ends(folder, self.renderer)


@dataclass(frozen=True)
class Opener:
    """Whatever is not as it was asked for is told."""

    task: TrainerTask
    plan: Plan
    tell: Callable[[Notice], None]

    def open(self, files: ExitStack, open_model: Callable[[], Model]) -> Opened:
        """Raises JobFailure."""
        inputs = self.task.inputs
        rows, held_out = open_sets(inputs, self.task.spec, files)
        if isinstance(rows, Chosen):
            self.tell(Notice(level="info", code="sampling", message=rows.sentence))
        facts = facts_of(open_folder(inputs.model, needs_weights=False).base)
        model = open_model()
        renderer = self._renderer(rows)
        if inputs.tokenizer is not None:
            foreign.refuse_larger(renderer, model, self.task.spec)
        return Opened(
            model=model,
            renderer=renderer,
            rows=rows,
            eval_rows=held_out,
            max_length=self._max_length(model),
            named=inputs.named,
            has_own_tokenizer=inputs.tokenizer is None,
            facts=facts,
        )

    def model(self) -> Model:
        folder, opening = self.task.inputs.model, self.opening()
        is_scoring = isinstance(self.task.spec, Reward)
        return open_scorer(folder, opening) if is_scoring else open_with(folder, opening)

    def opening(self) -> Opening:
        spec, plan = self.task.spec, self.plan
        return Opening(
            lora=None if isinstance(spec, Pretrain) else spec.lora,
            precision=plan.precision,
            device=plan.device,
            should_compile=plan.compile,
            seed=spec.optim.seed,
            gradient_checkpointing=bool(plan.gradient_checkpointing),
            quantization=self._quantization(),
            from_scratch=isinstance(spec, Pretrain) and spec.from_scratch,
            has_dropout=isinstance(spec, Sft | Pretrain),
            is_sharded=plan.parallel == "fsdp",
        )

    def _quantization(self) -> Literal["4bit", "8bit"] | None:
        """As asked for on a GPU; on a CPU the weights stay as they are, and that is said."""
        asked = self.task.spec.run.quantization
        if asked is None or self.plan.device.startswith("cuda"):
            return asked
        self._warn(
            "quantization_off",
            f"{asked} weights need a GPU, and this job runs on the CPU: the weights are kept in "
            "full precision, which takes more memory and loses nothing",
        )
        return None

    def _renderer(self, rows: Rows) -> Renderer:
        if self.task.inputs.tokenizer is not None:
            return self._brought()
        renderer = Renderer.load(Path(self.task.inputs.model))
        if renderer.template is not None or isinstance(self.task.spec, Pretrain):
            return renderer
        if not read_row(rows, 0).messages:
            return renderer
        renderer = renderer.with_fallback(rows.format)
        self._warn(
            "template_chosen",
            f"the model has no chat template: the {renderer.template_source} one is used "
            "and kept with the result",
        )
        return renderer

    def _brought(self) -> Renderer:
        renderer = foreign.load(self.task)
        if renderer.eos_token_id is None:
            self._warn(
                "no_end_token",
                "the tokenizer names no token that ends a text: documents follow each other "
                "without a mark",
            )
        return renderer

    def _max_length(self, model: Model) -> int:
        spec = self.task.spec
        asked = spec.sequence_length if isinstance(spec, Pretrain) else spec.max_length
        if asked <= model.context_length:
            return asked
        self._warn(
            "max_length_lowered",
            f"samples of {asked:,} tokens were asked for; the model's context of "
            f"{model.context_length:,} holds",
        )
        return model.context_length

    def _warn(self, code: str, message: str) -> None:
        self.tell(Notice(level="warning", code=code, message=message))

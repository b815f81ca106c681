"""Which samples and which objective each method has, made ready for its loop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tunesmith.data.fit import Cut
from tunesmith.data.holdout import Rows
from tunesmith.data.render import Renderer
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import Plan, TrainerTask
from tunesmith.spec.train import (
    Cpo,
    Grpo,
    Kto,
    Orpo,
    Ppo,
    Preference,
    Pretrain,
    Reinforcing,
    Reward,
    Rloo,
    Sft,
    Simpo,
)
from tunesmith.train.alarms import Alarms
from tunesmith.train.batches import Feed, Source
from tunesmith.train.frozen import Frozen
from tunesmith.train.grpo import GrpoLoss
from tunesmith.train.kto import JudgedReader, KtoLoss
from tunesmith.train.leash import Leash
from tunesmith.train.objective import Ground, Objective
from tunesmith.train.pairs import PairReader
from tunesmith.train.ppo import PpoLoss, ValueHead
from tunesmith.train.preference import CpoLoss, DpoLoss, OrpoLoss
from tunesmith.train.pretrain import BlockSource
from tunesmith.train.prompts import PromptReader
from tunesmith.train.reference import Reference, key_of, walk
from tunesmith.train.reward import RewardLoss
from tunesmith.train.rewarded import RewardedDraws
from tunesmith.train.rewarding import Rewarder
from tunesmith.train.rloo import RlooLoss
from tunesmith.train.rollout import Rollouts, Wish
from tunesmith.train.rounds import Drawer, RoundFeed, Rounds
from tunesmith.train.sft import LabelLoss, SampleReader
from tunesmith.train.source import RowSource
from tunesmith.train.steps import Steps

_NOT_DECISIVE = {"micro_batch_tokens", "gradient_checkpointing"}
"""Of a plan: what may change within a job, and changes what is measured by rounding alone."""


@dataclass(frozen=True)
class Stage:
    """What a method is made ready with."""

    task: TrainerTask
    plan: Plan
    ground: Ground[Any]
    renderer: Renderer
    max_length: int
    kept: Mapping[str, Tensor]
    """From the checkpoint that is gone on from, if there is one."""
    should_stop: Callable[[], bool]
    tell: Callable[[int, int], None]
    """Steps measured and to be measured before the first update."""
    warn: Callable[[str, str], None]
    """Of what is worth reading: a code and a sentence."""
    tell_drawing: Callable[[], None] = lambda: None
    """Called often while completions are drawn."""
    rewarder: Rewarder | None = None
    """Of completions, where the method draws any."""

    @property
    def samples_a_step(self) -> int:
        optim = self.task.spec.optim
        return optim.batch_size * optim.gradient_accumulation_steps * self.ground.group.size


@dataclass(frozen=True)
class Data:
    rows: Rows
    path: str
    seed: int | None
    """Of the order; None is the file's own."""
    name: str
    """`train` or `eval`."""


@dataclass(frozen=True)
class Method:
    source: Source[Any]
    objective: Objective[Any]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """What every checkpoint is to hold."""
    steps: Callable[[int], Steps[Any]] | None = None
    """Where samples for steps of so many come from, if not one after the other from the source."""

    stand_ins: Callable[[list[Any]], list[Any]] = list
    """From samples of the source to those of a step, where the latter are made of them."""

    def feed(self, samples_a_step: int) -> Steps[Any]:
        return self.steps(samples_a_step) if self.steps else Feed(self.source, samples_a_step)


def ready(stage: Stage, data: Data) -> Method:
    """Raises Interrupted where a stop came while the reference was measured."""
    match stage.task.spec:
        case Sft() as spec:
            reader = SampleReader(stage.renderer, _cut(stage, train_on=spec.train_on))
            return Method(_rows(stage, data, reader), LabelLoss(stage.ground))
        case Pretrain():
            blocks = BlockSource(
                data.rows, stage.renderer, stage.max_length, data.seed, stage.should_stop
            )
            return Method(blocks, LabelLoss(stage.ground))
        case Preference() as spec:
            pairs = _pairs(stage, data)
            reference = _reference(stage, data, pairs.places)
            return _measured(stage, data, pairs, DpoLoss(spec, stage.ground, reference))
        case Kto() as spec:
            judged = _judged(stage, data)
            reference = _reference(stage, data, judged.places)
            objective = KtoLoss(spec, stage.ground, reference, judged, stage.max_length)
            return _measured(stage, data, judged, objective)
        case Orpo() as spec:
            return Method(_pairs(stage, data), OrpoLoss(spec, stage.ground))
        case Cpo() | Simpo() as spec:
            return Method(_pairs(stage, data), CpoLoss(spec, stage.ground))
        case Reward() as spec:
            return Method(_pairs(stage, data), RewardLoss(spec, stage.ground))
        case Grpo() | Rloo() | Ppo() as spec:
            return _reinforced(stage, data, spec)


def _cut(stage: Stage, **more: Any) -> Cut:
    spec = stage.task.spec
    assert not isinstance(spec, Pretrain)
    return Cut(stage.max_length, spec.overlong, **more)


def _rows(stage: Stage, data: Data, reader: Any) -> RowSource[Any]:
    return RowSource(data.rows, reader, data.seed, stage.should_stop)


def _pairs(stage: Stage, data: Data) -> RowSource[Any]:
    return _rows(stage, data, PairReader(stage.renderer, _cut(stage)))


def _judged(stage: Stage, data: Data) -> RowSource[Any]:
    answers = 1 if data.rows.format == "unpaired" else 2
    return _rows(stage, data, JudgedReader(stage.renderer, _cut(stage), answers))


def _reference(stage: Stage, data: Data, places: int) -> Reference:
    spec = stage.task.spec
    decides = {
        "method": spec.method,
        "max_length": stage.max_length,
        "overlong": _cut(stage).overlong,
        "renderer": stage.renderer.digest,
        "seed": data.seed,
        "part": data.name if spec.holdout else "all",
        "holdout": spec.holdout,
        "samples_a_step": stage.samples_a_step,
        "steps": _steps(stage, data, places),
        "plan": stage.plan.model_dump(mode="json", exclude=_NOT_DECISIVE),
    }
    return Reference(places, key_of(stage.task, data.path, decides))


def _steps(stage: Stage, data: Data, places: int) -> int:
    """At least those that the first epoch will have: rows that are left out make it fewer."""
    optim = stage.task.spec.optim
    share = 1.0 if data.seed is None else min(1.0, optim.epochs)
    steps = math.ceil(round(share * math.ceil(places / stage.samples_a_step), 6))
    is_cut = data.seed is not None and optim.max_steps is not None
    return min(steps, optim.max_steps) if is_cut and optim.max_steps else steps


def _measured(
    stage: Stage, data: Data, source: RowSource[Any], objective: DpoLoss | KtoLoss
) -> Method:
    reference = objective.reference
    if not reference.restore(stage.kept, data.name):
        feed = Feed(source, stage.samples_a_step)
        steps = _steps(stage, data, source.places)
        objective.measure(walk(feed, steps, stage.should_stop, stage.tell))
    return Method(source, objective, reference.kept(data.name))


def _reinforced(stage: Stage, data: Data, spec: Grpo | Rloo | Ppo) -> Method:
    prompts = _rows(stage, data, PromptReader(stage.renderer, _prompt_cut(stage, spec)))
    drawer = _drawer(stage, data, spec)
    if data.seed is None:
        return Method(prompts, RewardedDraws(spec, stage.ground, drawer))
    loss: GrpoLoss | RlooLoss | PpoLoss
    head: ValueHead | None = None
    match spec:
        case Grpo():
            loss = GrpoLoss(spec, stage.ground)
        case Rloo():
            loss = RlooLoss(spec, stage.ground)
        case Ppo():
            head = ValueHead(stage.ground.model.width, stage.ground.device)
            loss = PpoLoss(spec, stage.ground, head)
    rounds = Rounds(
        spec=spec,
        ground=stage.ground,
        drawer=drawer,
        frozen=Frozen(stage.ground.model),
        estimate=loss.estimate,
        leash=Leash(spec.first_beta, spec.kl_target, spec.kl_gain),
        is_exact=stage.plan.precision == "fp32",
    )
    asked = spec.rollout_batch_size * stage.ground.group.size
    alarms = Alarms(stage.warn, spec.kl_target)
    return Method(
        prompts,
        loss,
        steps=lambda samples: RoundFeed(Feed(prompts, asked), rounds, samples, alarms, head),
        stand_ins=lambda found: rounds.stand_ins(found[: -(-len(found) // spec.num_generations)]),
    )


def _prompt_cut(stage: Stage, spec: Reinforcing) -> Cut:
    """What completions leave of the longest length."""
    room = stage.max_length - spec.max_completion_length
    if room < 1:
        raise JobFailure(
            FailureClass.USER_ERROR,
            f"max_completion_length {spec.max_completion_length:,} leaves no room for a prompt: "
            f"the model's context of {stage.max_length:,} tokens holds both",
            "lower max_completion_length",
        )
    return Cut(room, spec.overlong)


def _drawer(stage: Stage, data: Data, spec: Reinforcing) -> Drawer:
    wish = Wish(
        max_new_tokens=spec.max_completion_length,
        stop_ids=stage.renderer.stop_ids,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
    )

    def should_stop() -> bool:
        stage.tell_drawing()
        return stage.should_stop()

    rollouts = Rollouts(stage.ground.model, stage.ground.device, should_stop=should_stop)
    assert stage.rewarder is not None
    return Drawer(rollouts, wish, stage.rewarder, data.rows, stage.renderer)

"""Our side of the reinforcement benchmark: rounds and objective as a job has them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipe import answer_all
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.nn.language import open_model
from tunesmith.spec.pipe import Plan
from tunesmith.spec.train import Grpo, Lora
from tunesmith.train.alarms import Alarms
from tunesmith.train.frozen import Frozen
from tunesmith.train.grpo import GrpoLoss
from tunesmith.train.leash import Leash
from tunesmith.train.objective import Ground
from tunesmith.train.parallel import Group
from tunesmith.train.prompts import Prompt
from tunesmith.train.rewarding import Judged
from tunesmith.train.rollout import Rollouts, Wish
from tunesmith.train.rounds import Drawer, Rounds
from tunesmith.train.standing import Standing
from workload import (
    ALPHA,
    ASKED,
    COMPLETION,
    END,
    GENERATIONS,
    LEARNING_RATE,
    RANK,
    TARGETS,
    Work,
    prompts,
    reward,
)


@dataclass(frozen=True)
class Evenness:
    names: tuple[str, ...] = ("evenness",)
    weights: tuple[float, ...] = (1.0,)

    def score(self, judged: Sequence[Judged]) -> list[list[float]]:
        return [[reward(list(one.completion_ids))] for one in judged]


class Bare:
    """Rows that hold nothing but their place: prompts are ids here."""

    def __getitem__(self, at: int) -> Row:
        return Row(at + 1, prompt="")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    work = Work(**question)
    torch.set_num_threads(work.threads)
    lora = Lora(rank=RANK, alpha=ALPHA, targets=TARGETS) if work.is_lora else None
    model = open_model(work.model, lora=lora, has_dropout=False)
    ground = Ground(model, "cpu", Standing(Plan(threads=1, micro_batch_tokens=4096)), Group())
    spec = Grpo.model_validate(
        {
            "model": "m",
            "dataset": "d",
            "rewards": [{"kind": "exact_match"}],
            "num_generations": GENERATIONS,
            "max_completion_length": COMPLETION,
        }
    )
    objective = GrpoLoss(spec, ground)
    wish = Wish(COMPLETION, frozenset({END}))
    drawer = Drawer(
        Rollouts(model),
        wish,
        Evenness(),
        Bare(),
        Renderer.load(work.model),  # type: ignore[arg-type]
    )
    rounds = Rounds(spec, ground, drawer, Frozen(model), objective.estimate, Leash(0.0))
    alarms = Alarms(lambda *_: None)
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    total = work.warm_up + work.steps
    asked = [Prompt(place, ids) for place, ids in enumerate(prompts(total * ASKED))]
    rewards, lengths = [], []
    for step in range(total):
        if step == work.warm_up:
            cpu, wall = time.process_time(), time.perf_counter()
        episodes, told = rounds.make(step, asked[step * ASKED : (step + 1) * ASKED])
        alarms.look(told)
        bundles = episodes.bundles(range(len(episodes.completions)), 4096)
        for measured in objective.passes(bundles):
            (measured.loss / objective.units(bundles)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rewards.append(told["reward/mean"])
        lengths.append(told["episode_length"])
    return {
        "completions": work.steps * ASKED * GENERATIONS,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "rewards": rewards,
        "length": sum(lengths) / len(lengths),
    }


if __name__ == "__main__":
    answer_all(answer)

"""Our side of the DPO benchmark: reference and objective as a job has them, steps as its loop."""

import time
from typing import Any

import torch

from pipe import answer_all
from tunesmith.nn.forks import Fork
from tunesmith.nn.language import open_model
from tunesmith.spec.pipe import Plan
from tunesmith.spec.train import Lora, Preference
from tunesmith.train.objective import Ground
from tunesmith.train.pairs import Pair
from tunesmith.train.parallel import Group
from tunesmith.train.preference import DpoLoss
from tunesmith.train.reference import Reference
from tunesmith.train.standing import Standing
from workload import ALPHA, BETA, LEARNING_RATE, PAIRS, RANK, TARGETS, Work, pair_samples

SAMPLES = [
    Pair(
        place,
        Fork(
            one.prompt,
            tuple((ids, [True] * len(ids)) for ids in (one.chosen, one.rejected)),
        ),
        len(one.chosen),
        len(one.rejected),
        0.0,
    )
    for place, one in enumerate(pair_samples())
]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The clock of a variant that ends in `kept` starts once the reference is measured."""
    work = Work(**question)
    torch.set_num_threads(work.threads)
    lora = Lora(rank=RANK, alpha=ALPHA, targets=TARGETS) if work.is_lora else None
    model = open_model(work.model, lora=lora, has_dropout=False)
    objective = DpoLoss(
        Preference(model="m", dataset="d", beta=BETA),
        Ground(model, "cpu", Standing(Plan(threads=1, micro_batch_tokens=4096)), Group()),
        Reference(len(SAMPLES), "00"),
    )
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    total = work.warm_up + work.steps
    steps = [SAMPLES[step * PAIRS : (step + 1) * PAIRS] for step in range(total)]
    objective.measure(steps[: work.warm_up])
    began = time.process_time(), time.perf_counter()
    objective.measure(steps[work.warm_up :])
    measured = time.process_time() - began[0], time.perf_counter() - began[1]
    losses = []
    for number, pairs in enumerate(steps):
        if number == work.warm_up:
            cpu, wall = time.process_time(), time.perf_counter()
        losses.append(_take_step(objective, parameters, optimizer, pairs))
    is_kept = work.variant.endswith("kept")
    return {
        "pairs": work.steps * PAIRS,
        "cpu": time.process_time() - cpu + (0 if is_kept else measured[0]),
        "wall": time.perf_counter() - wall + (0 if is_kept else measured[1]),
        "losses": losses,
        "is_lean": model.is_lean,
    }


def _take_step(
    objective: DpoLoss,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
) -> float:
    """Loss before the update."""
    total = 0.0
    for measured in objective.passes(pairs):
        loss = measured.loss / len(pairs)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


if __name__ == "__main__":
    answer_all(answer)

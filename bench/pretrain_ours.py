"""Our side of the pretraining benchmark: steps as a job's loop takes them, on packed blocks."""

import time
from typing import Any

import torch

from ours import matmul_peak
from pipe import answer_all
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import open_model
from workload import BATCH, BLOCK, LEARNING_RATE, Work, blocks


def answer(question: dict[str, Any]) -> dict[str, Any]:
    work = Work(**question)
    torch.set_num_threads(work.threads)
    before = matmul_peak()
    found = train(work)
    return {**found, "peak": max(before, matmul_peak())}


def train(work: Work) -> dict[str, Any]:
    model = open_model(work.model, lora=None)
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rows, losses = blocks((work.warm_up + work.steps) * BATCH), []
    for step in range(work.warm_up + work.steps):
        if step == work.warm_up:
            cpu, wall = time.process_time(), time.perf_counter()
        mine = rows[step * BATCH : (step + 1) * BATCH]
        batch = flatten([(ids, [True] * BLOCK) for ids in mine])
        loss = model.loss_sum(batch) / batch.labels
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return {
        "tokens": work.steps * BATCH * BLOCK,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "losses": losses,
    }


if __name__ == "__main__":
    answer_all(answer)

"""Our side of the training benchmark: the model as a job opens it, steps as its loop takes them."""

import time
from typing import Any

import torch

from pipe import answer_all
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import LanguageModel, open_model
from tunesmith.nn.matmul import prefers_onednn, product
from tunesmith.spec.train import Lora
from workload import ALPHA, BATCH, LEARNING_RATE, RANK, TARGETS, Work, samples

SAMPLES = samples()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    if question["variant"] == "peak":
        torch.set_num_threads(question["threads"])
        return {"peak": matmul_peak(), "is_onednn": prefers_onednn()}
    return train(Work(**question))


def train(work: Work) -> dict[str, Any]:
    torch.set_num_threads(work.threads)
    opened = time.process_time()
    lora = Lora(rank=RANK, alpha=ALPHA, targets=TARGETS) if work.is_lora else None
    model = open_model(work.model, lora=lora, compile=work.variant.endswith("compiled"))
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses, tokens = [], 0
    for step in range(work.warm_up + work.steps):
        if step == work.warm_up:
            cpu, wall, tokens = time.process_time(), time.perf_counter(), 0
            before = cpu - opened
        loss, step_tokens = take_step(model, parameters, optimizer, step)
        losses.append(loss)
        tokens += step_tokens
    return {
        "tokens": tokens,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "losses": losses,
        "filled": 1.0,
        "before": before,
        "is_lean": model.is_lean,
    }


def take_step(
    model: LanguageModel,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> tuple[float, int]:
    """Loss before the update, and the tokens that went in."""
    batch = flatten(SAMPLES[step * BATCH : (step + 1) * BATCH])
    loss = model.loss_sum(batch) / batch.labels
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), len(batch)


def matmul_peak(size: int = 1536, seconds: float = 0.4) -> float:
    """FLOP in a CPU second of a large fp32 product, by the better of the libraries at hand."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    ways = (lambda: a @ b.t(), lambda: product(a, b))
    return max(_rate(way, 2 * size**3, seconds) for way in ways)


def _rate(work: Any, flops: int, seconds: float) -> float:
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        work()
        best = max(best, flops / (time.process_time() - start))
    return best


if __name__ == "__main__":
    answer_all(answer)

"""The other side of the pretraining benchmark: transformers' Trainer at its defaults, in fp32."""

import time
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pipe import answer_all
from workload import BATCH, BLOCK, LEARNING_RATE, Work, blocks


class Watched(Trainer):  # type: ignore[misc]
    """Notes the clocks before each step."""

    def __init__(self, **settings: Any) -> None:
        self.seen: list[tuple[float, float]] = []
        super().__init__(**settings)

    def training_step(self, *given: Any, **named: Any) -> Any:
        self.seen.append((time.process_time(), time.perf_counter()))
        return super().training_step(*given, **named)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    work = Work(**question)
    torch.set_num_threads(work.threads)
    rows = blocks((work.warm_up + work.steps) * BATCH)
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=f"{work.model}/peer",
            report_to="none",
            use_cpu=True,
            max_steps=work.warm_up + work.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )
    trainer.train()
    cpu, wall = time.process_time(), time.perf_counter()
    began = trainer.seen[work.warm_up]
    return {
        "tokens": work.steps * BATCH * BLOCK,
        "cpu": cpu - began[0],
        "wall": wall - began[1],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


if __name__ == "__main__":
    answer_all(answer)

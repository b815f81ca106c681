"""The other side: TRL's GRPOTrainer in fp32, without gradient checkpointing, which is slower."""

import logging
import time
import warnings
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from pipe import answer_all
from workload import (
    ALPHA,
    ASKED,
    COMPLETION,
    GENERATIONS,
    LEARNING_RATE,
    RANK,
    TARGETS,
    Work,
    prompts,
    reward,
)


class Watched(GRPOTrainer):  # type: ignore[misc]
    """On ids as they are; notes the clocks before each step."""

    def __init__(self, ids: list[list[int]], **settings: Any) -> None:
        self.seen: list[tuple[float, float]] = []
        self._ids = ids
        super().__init__(**settings)

    def _tokenize_prompts(self, asked: list[str]) -> Any:
        return [self._ids[int(one)] for one in asked], None, {}

    def training_step(self, *rest: Any, **named: Any) -> Any:
        self.seen.append((time.process_time(), time.perf_counter()))
        return super().training_step(*rest, **named)


def evenness(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward(ids) for ids in completion_ids]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    work = Work(**question)
    torch.set_num_threads(work.threads)
    trainer = _trainer(work)
    trainer.train()
    cpu, wall = time.process_time(), time.perf_counter()
    began = trainer.seen[work.warm_up]
    lines = [line for line in trainer.state.log_history if "reward" in line]
    lengths = [line["completions/mean_length"] for line in lines]
    return {
        "completions": work.steps * ASKED * GENERATIONS,
        "cpu": cpu - began[0],
        "wall": wall - began[1],
        "rewards": [line["reward"] for line in lines],
        "length": sum(lengths) / len(lengths),
    }


def _trainer(work: Work) -> Watched:
    ids = prompts((work.warm_up + work.steps) * ASKED)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    args = GRPOConfig(
        output_dir=f"{work.model}/peer",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=work.warm_up + work.steps,
        per_device_train_batch_size=ASKED * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=COMPLETION,
        shuffle_dataset=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    return Watched(
        ids,
        model=work.model,
        args=args,
        reward_funcs=evenness,
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(at) for at in range(len(ids))]}),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=lora if work.is_lora else None,
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    answer_all(answer)

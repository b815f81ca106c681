"""The other side: TRL's DPOTrainer in fp32, without gradient checkpointing, which is slower."""

import logging
import time
import warnings
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from pipe import answer_all
from workload import ALPHA, BETA, LEARNING_RATE, LONGEST, PAIRS, RANK, TARGETS, Work, pair_samples

SAMPLES = pair_samples()


class Watched(DPOTrainer):  # type: ignore[misc]
    """On ids as they are; notes the clocks before each step."""

    def __init__(self, **settings: Any) -> None:
        self.seen: list[tuple[float, float]] = []
        super().__init__(**settings)

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset

    def training_step(self, *rest: Any, **named: Any) -> Any:
        self.seen.append((time.process_time(), time.perf_counter()))
        return super().training_step(*rest, **named)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    work = Work(**question)
    torch.set_num_threads(work.threads)
    trainer = _trainer(work, is_kept=work.variant.endswith("kept"))
    trainer.train()
    cpu, wall = time.process_time(), time.perf_counter()
    began = trainer.seen[work.warm_up]
    return {
        "pairs": work.steps * PAIRS,
        "cpu": cpu - began[0],
        "wall": wall - began[1],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def _trainer(work: Work, *, is_kept: bool) -> Watched:
    count = (work.warm_up + work.steps) * PAIRS
    columns = {
        "prompt_ids": [one.prompt for one in SAMPLES[:count]],
        "chosen_ids": [one.chosen for one in SAMPLES[:count]],
        "rejected_ids": [one.rejected for one in SAMPLES[:count]],
    }
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    args = DPOConfig(
        output_dir=f"{work.model}/peer",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=BETA,
        precompute_ref_log_probs=is_kept,
        max_steps=work.warm_up + work.steps,
        per_device_train_batch_size=PAIRS,
        max_length=LONGEST,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    return Watched(
        model=work.model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(columns),
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

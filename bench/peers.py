"""The other side: TRL's SFTTrainer, at its defaults and as well configured as we know how.

All run on the CPU in fp32: the literal default (bf16) is several times slower on most CPUs.
"""

import logging
import time
import warnings
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, SFTTrainer

from pipe import answer_all
from workload import ALPHA, BATCH, LEARNING_RATE, LONGEST, PAD, RANK, TARGETS, Work, samples

SAMPLES = samples()
BEST = {"gradient_checkpointing": False, "loss_type": "chunked_nll"}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": BEST,
    "packed": BEST | {"packing": True, "per_device_train_batch_size": 2},
}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    work = Work(**question)
    torch.set_num_threads(work.threads)
    kind = work.variant.rsplit(" ", 1)[-1]
    trainer = _trainer(work, _rows(kind, work), SETTINGS[kind])
    trainer.train()
    cpu, wall = time.process_time(), time.perf_counter()
    measured = trainer.seen[work.warm_up :]
    tokens, places = (sum(one[part] for one in measured) for part in (0, 1))
    return {
        "tokens": tokens,
        "cpu": cpu - measured[0][2],
        "wall": wall - measured[0][3],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "filled": tokens / places,
    }


class Watched(SFTTrainer):  # type: ignore[misc]
    """Notes, before each step, its tokens, its places (padding included) and the clocks."""

    def __init__(self, **settings: Any) -> None:
        self.seen: list[tuple[int, int, float, float]] = []
        super().__init__(**settings)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        ids = inputs["input_ids"]
        counts = (int((ids != PAD).sum()), ids.numel())
        self.seen.append((*counts, time.process_time(), time.perf_counter()))
        return super().training_step(model, inputs, *rest, **named)


def _rows(kind: str, work: Work) -> list[int]:
    """Which samples, in which order: the trainer takes them as they come.

    Grouping by length makes batches from the longest to the shortest, so evenly spaced ones of
    the order that transformers' own sampler gives stand for all.
    """
    if kind != "grouped":
        return list(range(len(SAMPLES)))
    lengths = [len(ids) for ids, _ in SAMPLES]
    dice = torch.Generator().manual_seed(0)
    order = get_length_grouped_indices(lengths, BATCH, generator=dice)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    spread = [batches[len(batches) * step // work.steps] for step in range(work.steps)]
    return [row for batch in spread[: work.warm_up] + spread for row in batch]


def _trainer(work: Work, rows: list[int], settings: dict[str, Any]) -> Watched:
    columns = {
        "input_ids": [SAMPLES[row][0] for row in rows],
        "completion_mask": [[int(one) for one in SAMPLES[row][1]] for row in rows],
    }
    common = {
        "output_dir": f"{work.model}/peer",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": work.warm_up + work.steps,
        "per_device_train_batch_size": BATCH,
        "max_length": LONGEST,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "completion_only_loss": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return Watched(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=SFTConfig(**common | settings),
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

"""A cold TRL process: import, load, tokenise, one LoRA step; prints its CPU seconds by then."""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(model: str, data: str) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from workload import RANK

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            spent.append(time.process_time())

    spent: list[float] = []
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    settings = SFTConfig(
        output_dir=str(Path(data).parent / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=512,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    print(spent[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

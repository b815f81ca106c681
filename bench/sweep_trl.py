"""One LoRA training by TRL in a process of its own: prints its losses and its shared memory.

Its defaults, in fp32 and without gradient checkpointing, which is slower.
"""

import json
import sys
from pathlib import Path
from typing import Any

import psutil


def main(question: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in Path(question["data"]).read_text().splitlines()]
    settings = SFTConfig(
        output_dir=f"{question['model']}/trl",
        max_steps=question["steps"],
        learning_rate=question["learning_rate"],
        per_device_train_batch_size=question["batch"],
        max_length=question["longest"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(question["model"]),
        peft_config=LoraConfig(
            r=question["rank"],
            lora_alpha=question["alpha"],
            target_modules=question["targets"],
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.save_model(f"{question['model']}/trl")
    used = psutil.Process().memory_full_info()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps({"losses": losses, "shared": used.rss - used.uss}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

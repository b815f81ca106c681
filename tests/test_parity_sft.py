"""The first ten steps of supervised fine-tuning against TRL's SFTTrainer: same ids, same order."""

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from train_fixtures import Place, make_model, pairs, run_here, sft, write_rows
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.nn.language import open_model
from tunesmith.spec.train import Lora
from tunesmith.train.batches import Shuffle

STEPS, BATCH, RATE, SEED = 10, 4, 1e-3, 42
CLOSE = 1e-4


def place_of(folder: Any, accumulation: int) -> Place:
    torch.set_num_threads(1)
    rows = write_rows(folder / "rows.jsonl", pairs(STEPS * BATCH * accumulation, 30))
    return Place(folder, make_model(folder / "model"), rows)


def in_our_order(place: Place) -> Dataset:
    renderer = Renderer.load(place.model)
    with RowIndex.open(place.dataset) as index:
        encoded = [renderer.encode(index[at]) for at in Shuffle(len(index), SEED, 0)]
    columns = {
        "input_ids": [list(one.ids) for one in encoded],
        "completion_mask": [[int(is_label) for is_label in one.mask] for one in encoded],
    }
    return Dataset.from_dict(columns)


def theirs(place: Place, lora: Lora | None, accumulation: int) -> list[dict[str, float]]:
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    if lora is not None:
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=int(lora.alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        own = open_model(str(place.model), lora=lora, seed=SEED).weights()
        parameters = {name.replace(".default.", "."): one for name, one in model.named_parameters()}
        with torch.no_grad():
            for name, tensor in own.items():
                parameters[name].copy_(tensor)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(place.folder / "trl"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            max_length=256,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=in_our_order(place),
        processing_class=AutoTokenizer.from_pretrained(place.model),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_the_first_steps_are_those_of_trl(
    tmp_path: Any, lora: Lora | None, accumulation: int
) -> None:
    place = place_of(tmp_path, accumulation)
    spec = sft(lora, learning_rate=RATE, batch_size=BATCH, gradient_accumulation_steps=accumulation)
    ours = run_here(place.task(spec)).of("step")
    known = theirs(place, lora, accumulation)
    assert len(ours) == len(known) == STEPS
    for mine, other in zip(ours, known, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=CLOSE)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=CLOSE)
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"], rel=CLOSE)
    assert ours[-1]["loss"] != ours[0]["loss"]

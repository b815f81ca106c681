"""A small language model that has learnt something, to see whether rounded weights say the same.

Of random weights the likeliest token is likeliest by a hair, so that they show less.
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serve_model import tokenizer
from tunesmith.data import samples
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import open_model

STEPS = 200
BATCH, BLOCK = 8, 256
RATE = 1e-3
ROWS = 40
"""Of text that was not trained on."""


def make(folder: Path, threads: int) -> tuple[Path, list[list[int]]]:
    """The model's folder, and rows of ids that it has not seen."""
    made = tokenizer()
    text = samples.documentation_text(6_000_000, seed=1)
    ids = [id_ for one in text for id_ in made.encode(one)]
    blocks = [ids[at : at + BLOCK] for at in range(0, len(ids) - BLOCK, BLOCK)]
    place = folder / "trained"
    if not (place / "ready").is_file():
        _train(place, blocks[:-ROWS], threads)
        made.save_pretrained(place)
        (place / "ready").touch()
    return place, blocks[-ROWS:]


def _train(place: Path, blocks: list[list[int]], threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    new = place.with_name("untrained")
    LlamaForCausalLM(_config()).save_pretrained(new)
    model = open_model(str(new), lora=None)
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        rows = [blocks[(step * BATCH + at) % len(blocks)] for at in range(BATCH)]
        batch = flatten([(ids, [True] * BLOCK) for ids in rows])
        loss = model.loss_sum(batch) / batch.labels
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            print(f"  trained for {step + 1} of {STEPS} steps, loss {loss.item():.2f}", flush=True)
    model.save(place)


def _config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=7,
        num_attention_heads=5,
        num_key_value_heads=5,
        vocab_size=4096,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )

"""The contract of the tasks: its four configurations as they stand there, rows of its shapes, and a
folder in which the names that they name are tiny models and small files."""

import io
import shutil
from pathlib import Path
from typing import Any

from train_fixtures import WORDS, make_model, write_rows

SFT = """\
task_type: sft
model_name: qwen-7b
dataset: datasets/sft_dataset.jsonl     # must be the project's dataset_name
max_seq_length: 2048
per_device_train_batch_size: 4
learning_rate: 2e-5
num_train_epochs: 3
"""
RL = """\
task_type: rl
algorithm: ppo            # also: grpo, rloo, dpo, kto, orpo, reward (trains a reward model)
policy_model: qwen-7b-sft
reward_model: qwen-7b-rm  # a local checkpoint, or the URL of a reward service
dataset: datasets/rl_preference.jsonl
rollout_batch_size: 16
update_epochs: 4
kl_target: 0.1
"""
LORA = """\
task_type: lora
base_model: llama2-7b
dataset: datasets/lora_demo.jsonl
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
train_batch_size: 64
gradient_accumulation_steps: 4
use_8bit: true            # optional: peft_target_modules, bnb_4bit_quant_type, use_4bit
"""
PRETRAIN = """\
task_type: pretrain
model_name: llama2-7b
dataset: datasets/pretrain_corpus.jsonl
sequence_length: 4096
global_batch_size: 1024   # = per-device batch × data parallelism × accumulation
learning_rate: 3e-4
warmup_ratio: 0.01
tokenizer: configs/tokenizer.model
"""


PLAIN_PIECES = {"model_type": "unigram", "vocab_size": 57, "byte_fallback": False}
"""Options of a tokenizer that does not know bytes."""


def lay_out(folder: Path) -> None:
    """All that the configurations name, but for the reward model."""
    shutil.copytree(make_model(folder / "llama2-7b"), folder / "qwen-7b")
    make_model(folder / "qwen-7b-sft", context=2048)
    (folder / "configs").mkdir()
    (folder / "configs" / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "datasets").mkdir(exist_ok=True)
    for name, rows in SAMPLES.items():
        write_rows(folder / "datasets" / f"{name}.jsonl", rows)


def sentencepiece_model(**options: Any) -> bytes:
    """A real one, trained here: of pairs of bytes, every byte a piece, unless told otherwise."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    told = {"model_type": "bpe", "vocab_size": 316, "byte_fallback": True, **options}
    texts = [words(at, 12) for at in range(40)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, minloglevel=2, **told
    )
    return written.getvalue()


def words(at: int, count: int = 3) -> str:
    return " ".join(WORDS[(at * 7 + k) % len(WORDS)] for k in range(count))


def conversation(at: int) -> dict[str, Any]:
    return {
        "conversation_id": f"c{at}",
        "messages": [
            {"role": "user", "content": words(at)},
            {"role": "assistant", "content": words(at + 1)},
        ],
        "task_tags": ["말", "话"],
        "metadata": {"source": "made"},
    }


def preference(at: int) -> dict[str, Any]:
    return {
        "prompt": words(at),
        "chosen": words(at + 1),
        "rejected": words(at + 2, 4),
        "metadata": {"rater": at % 3},
    }


def scored(at: int) -> dict[str, Any]:
    told = [{"content": words(at + k), "score": (at + k) % 3} for k in range(1, 4)]
    return {"prompt": words(at), "responses": told}


def document(at: int) -> dict[str, Any]:
    return {"text": words(at, 40), "doc_id": f"d{at}", "metadata": {"lang": "ko"}}


COUNT = 24
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "sft_dataset": [
        *(conversation(at) for at in range(COUNT)),
        conversation(COUNT) | {"system_prompt": "친절히", "input_template": "{input}?"},
    ],
    "lora_demo": [conversation(at) for at in range(COUNT)],
    "rl_preference": [preference(at) for at in range(COUNT)],
    "rl_scored": [scored(at) for at in range(COUNT)],
    "pretrain_corpus": [document(at) for at in range(COUNT)],
}

"""A training configuration in a file."""

from pathlib import Path

from tunesmith.cli.near import names_in, near_name
from tunesmith.errors import NotFoundError, ValidationError
from tunesmith.spec import written, yaml_guard
from tunesmith.spec.configuration import Configuration
from tunesmith.spec.train import AnySpec

EXAMPLE = """\
# A LoRA fine-tune. Paths are relative to the folder you start it from.
method: sft                   # or pretrain, dpo, kto, orpo, cpo, simpo, reward, grpo, rloo, ppo
model: models/base            # a folder with config.json, weights and a tokenizer
dataset: data/train.jsonl     # {"messages": [...]}, Alpaca, prompt/completion or ShareGPT
# eval_dataset: data/eval.jsonl
max_length: 1024
lora:                         # `lora: null` trains every weight
  rank: 8
  alpha: 16
  targets: all-linear
optim:
  learning_rate: 2e-4
  epochs: 3
  batch_size: 4
  scheduler: cosine
  warmup_ratio: 0.03
  seed: 42
run:
  save_seconds: 60
"""


def read_configuration(path: Path) -> Configuration:
    """Raises NotFoundError, or ValidationError with one entry for each fault."""
    return written.parse(read_bytes(path), path.name)


def read_spec(path: Path) -> AnySpec:
    """Raises as `read_configuration`."""
    return read_configuration(path).spec


def read_bytes(path: Path) -> bytes:
    """Raises NotFoundError, ValidationError."""
    try:
        with path.open("rb") as file:
            return file.read(yaml_guard.MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"no file {str(path)!r}{near_name(path.name, names_in(path.parent))}"
        ) from None
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror}") from None

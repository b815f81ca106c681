"""What a training request may ask for. Pure data: no torch, no files, no database."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tunesmith.spec.strict import Name, Strict

MAX_LENGTH_LIMIT = 1 << 20
"""Tokens: the longest sample that may be asked for."""

Target = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\w.\-]+$")]


FieldName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^\w+$")]
Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Columns = Annotated[dict[FieldName, Column], Field(max_length=32)]
"""Field of a format → column of the file."""


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(8, ge=1, le=1024)
    alpha: float = Field(16, gt=0, le=65536)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | Annotated[tuple[Target, ...], Field(max_length=256)] = (
        "all-linear"
    )
    """Module names as PEFT takes them, or every linear layer but the head."""


class Optim(Strict):
    learning_rate: float = Field(2e-5, gt=0, le=10)
    epochs: float = Field(3, gt=0, le=10_000)
    max_steps: int | None = Field(None, ge=1, le=100_000_000)
    """Optimizer steps; where given it ends the training before `epochs` does."""
    batch_size: int = Field(4, ge=1, le=65_536)
    """Samples per device and accumulation step."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=65_536)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Share of all steps."""
    warmup_steps: int | None = Field(None, ge=0, le=100_000_000)
    """Where given it wins over `warmup_ratio`."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, le=1)
    max_grad_norm: float = Field(1.0, ge=0, le=1e6)
    """0 turns clipping off."""
    seed: int = Field(42, ge=0, le=2**31 - 1)


class Run(Strict):
    """How the training is carried out, whatever its method."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has units for it, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: not; on a CPU it was measured to gain little (docs/performance.md)."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """auto: only where memory does not suffice."""
    quantization: Literal["4bit", "8bit"] | None = None
    devices: int = Field(1, ge=1, le=1024)
    """GPUs that share each step, or processes on a CPU: data parallel, under torchrun."""
    logging_steps: int = Field(1, ge=1, le=1_000_000)
    save_steps: int | None = Field(None, ge=1, le=100_000_000)
    save_seconds: float = Field(60, gt=0, le=86_400)
    """A checkpoint at least this often, and at `save_steps`, and at the end."""
    keep_checkpoints: int = Field(2, ge=1, le=1000)
    eval_steps: int | None = Field(None, ge=1, le=100_000_000)
    """Where a validation set is given: also at the end of each epoch."""


class Data(Strict):
    """How the rows of the data set, and of the one for validation, are read."""

    columns: Columns = {}
    """Mapped by hand, {"instruction": "question"}; then other columns are ignored."""


class Sft(Data):
    """Supervised fine-tuning on conversations, instructions or prompt and completion."""

    method: Literal["sft"] = "sft"
    model: Name
    dataset: Name
    eval_dataset: Name | None = None
    max_length: int = Field(1024, ge=8, le=MAX_LENGTH_LIMIT)
    """Tokens. The model's own context, where it is shorter, holds."""
    overlong: Literal["drop", "truncate", "refuse"] = "drop"
    """What becomes of a sample over `max_length`: each is counted and reported, in every case."""
    train_on: Literal["completions", "all"] = "completions"
    lora: Lora | None = Lora()
    """None trains every weight."""
    optim: Optim = Optim()
    run: Run = Run()


class Pretrain(Data):
    """Next-token training on plain text, packed to rows of `sequence_length` tokens."""

    method: Literal["pretrain"] = "pretrain"
    model: Name
    """A folder with config.json and a tokenizer; weights where `from_scratch` is false."""
    dataset: Name
    eval_dataset: Name | None = None
    clean: bool = False
    """Remove control characters; else a document that holds one is refused."""
    from_scratch: bool = True
    sequence_length: int = Field(256, ge=8, le=MAX_LENGTH_LIMIT)
    optim: Optim = Optim(learning_rate=1e-3, epochs=1, batch_size=8)
    run: Run = Run()


TrainSpec = Annotated[Sft | Pretrain, Field(discriminator="method")]

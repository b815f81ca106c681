"""What a training request may ask for. Pure data: no torch, no files, no database."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from tunesmith.spec.strict import Name, Strict

MAX_LENGTH_LIMIT = 1 << 20
"""Tokens: the longest sample that may be asked for."""

PairLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]

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
    must_quantize: bool = True
    """False: without a GPU, or without bitsandbytes, full precision and a warning will do."""
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


class Tuning(Data):
    """What all methods that tune a model on the rows of a file have in common."""

    sequences_a_sample: ClassVar[int] = 1
    """Each of up to `max_length` tokens."""
    model: Name
    dataset: Name
    eval_dataset: Name | None = None
    max_length: int = Field(1024, ge=8, le=MAX_LENGTH_LIMIT)
    """Tokens. The model's own context, where it is shorter, holds."""
    overlong: Literal["drop", "truncate", "refuse"] = "drop"
    """What becomes of a sample over `max_length`: each is counted and reported, in every case."""
    lora: Lora | None = Lora()
    """None trains every weight."""
    optim: Optim = Optim()
    run: Run = Run()


class Sft(Tuning):
    """Supervised fine-tuning on conversations, instructions or prompt and completion."""

    method: Literal["sft"] = "sft"
    train_on: Literal["completions", "all"] = "completions"


class PreferenceOptim(Optim):
    """The defaults of methods that start from a model that answers well already."""

    learning_rate: float = Field(5e-7, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)


class RewardOptim(Optim):
    learning_rate: float = Field(1e-4, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)


class Comparing(Tuning):
    """Methods that learn from answers that were judged. Dropout is off in all of them: what is
    compared must be the same function of the weights."""

    optim: PreferenceOptim = PreferenceOptim()


Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
"""The share of pairs whose order is taken to be wrong."""


def check_pair_loss(loss: PairLoss, label_smoothing: float, length_normalised: bool) -> None:
    """Raises ValueError where an option means nothing to the loss, or lacks."""
    if label_smoothing and loss not in {"sigmoid", "robust", "exo_pair"}:
        raise ValueError(f"label_smoothing means nothing to the loss {loss}; leave it 0")
    if loss == "exo_pair" and not label_smoothing:
        raise ValueError("the loss exo_pair needs a label_smoothing above 0, such as 0.001")
    if length_normalised and loss not in {"sigmoid", "robust", "hinge", "ipo"}:
        raise ValueError(f"the loss {loss} is not defined with length_normalised")


class Preference(Comparing):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its kin.

    The reference is the model as it is opened: a folder of full weights, or an adapter on its base.
    """

    sequences_a_sample: ClassVar[int] = 2
    method: Literal["dpo"] = "dpo"
    loss: PairLoss = "sigmoid"
    """What is made of a pair's difference in log-ratios: see `train/preference.py`."""
    beta: float = Field(0.1, gt=0, le=1000)
    """How dear it is to leave the reference: higher stays nearer."""
    label_smoothing: Smoothing = 0.0
    """For the losses sigmoid, robust and exo_pair, which needs it above 0."""
    length_normalised: bool = False
    """Log-ratios for each token of the answer, not for all of it; always so with ipo."""

    @model_validator(mode="after")
    def _check_loss(self) -> "Preference":
        check_pair_loss(self.loss, self.label_smoothing, self.length_normalised)
        return self


class Kto(Comparing):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306) on answers that are
    each marked as wanted or not; of a pair both answers are taken."""

    method: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, le=1000)
    desirable_weight: float = Field(1.0, gt=0, le=1000)
    undesirable_weight: float = Field(1.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _check_step(self) -> "Kto":
        if self.optim.batch_size * self.optim.gradient_accumulation_steps < 2:
            raise ValueError("kto compares a step's answers: optim.batch_size has to be 2 or more")
        return self


class Orpo(Comparing):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691): no reference."""

    sequences_a_sample: ClassVar[int] = 2
    method: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, le=1000)
    """Weight of the odds ratio beside the loss on the chosen sequence; lambda in the paper."""


class Cpo(Comparing):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417): no reference."""

    sequences_a_sample: ClassVar[int] = 2
    method: Literal["cpo"] = "cpo"
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    beta: float = Field(0.1, gt=0, le=1000)
    alpha: float = Field(1.0, ge=0, le=1000)
    """Weight of the loss on the chosen answer."""
    label_smoothing: Smoothing = 0.0

    @model_validator(mode="after")
    def _check_loss(self) -> "Cpo":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing means nothing to the loss {self.loss}; leave it 0")
        return self


class Simpo(Comparing):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734): no reference, rewards
    by token."""

    sequences_a_sample: ClassVar[int] = 2
    method: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, le=1000)
    gamma: float = Field(0.5, ge=0, le=1000)
    """The margin that the chosen answer's reward is to have."""
    alpha: float = Field(0.0, ge=0, le=1000)
    """Weight of a loss on the chosen answer; 0 is SimPO as published, 1 CPO-SimPO."""


class Reward(Tuning):
    """A reward model from pairs: a score for each sequence (Bradley-Terry; Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1). A row's `margin` is what its scores are to differ by.
    Dropout is off."""

    sequences_a_sample: ClassVar[int] = 2
    method: Literal["reward"] = "reward"
    center: float = Field(0.0, ge=0, le=1000)
    """Weight of what draws scores to 0 (Eisenstein et al. 2023, arXiv:2312.09244, section 3)."""
    optim: RewardOptim = RewardOptim()


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


AnySpec = Sft | Pretrain | Preference | Kto | Orpo | Cpo | Simpo | Reward
TrainSpec = Annotated[AnySpec, Field(discriminator="method")]

"""What a training request may ask for. Pure data: no torch, no files, no database."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from tunesmith.spec.rewards import RewardSource, TrainedModel, models_in
from tunesmith.spec.sampling import Sampling
from tunesmith.spec.strict import Name, Strict
from tunesmith.spec.sweep import LORA_SETTINGS, Sweep, TrialName

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
    use_rslora: bool = False
    """Scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732): a high rank then
    learns as fast as a low one."""
    use_dora: bool = False
    """The lengths of the weights are trained apart from their directions (Liu et al. 2024,
    arXiv:2402.09353)."""
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


MetricName = Annotated[str, StringConstraints(min_length=1, max_length=59, pattern=r"^[\w/.\-]+$")]
FALLING = ("loss", "perplexity", "kl_divergence")
"""How the names of metrics end of which less is better."""


class Best(Strict):
    """What is done with the evaluations of a training beside telling them."""

    metric: MetricName = "eval_loss"
    """By which evaluations are compared."""
    greater_is_better: bool | None = None
    """None: by the metric's name; less is better of losses and perplexity, more of the others."""
    patience: int | None = Field(None, ge=1, le=10_000)
    """Evaluations in a row without a better one, after which the training ends early."""
    min_delta: float = Field(0.0, ge=0, le=1e9)
    """What is no more than this better, is not better."""
    keep: bool = True
    """The result has the weights of the best evaluation, not the last ones."""

    @property
    def is_greater_better(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.metric.endswith(FALLING)


class Run(Strict):
    """How the training is carried out, whatever its method."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has units for it, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: not; on a CPU it was measured to gain little (docs/performance.md)."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """auto: only where memory does not suffice."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Of frozen weights, on a GPU, through bitsandbytes: 4bit is NF4 (Dettmers et al. 2023,
    arXiv:2305.14314, section 3). On a CPU the weights stay as they are, with a warning."""
    devices: int = Field(1, ge=1, le=1024)
    """GPUs that share each step, or processes on a CPU, under torchrun."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """What each of several devices holds. ddp: a copy of the model. fsdp: a part of every weight,
    its gradient and its moments (Zhao et al. 2023, arXiv:2304.11277). auto: a copy, if it fits."""
    probe: bool = False
    """Make a step on the longest samples first, so that memory that does not suffice shows then."""
    on_nan: Literal["fail", "skip"] = "fail"
    """What becomes of a job at a step whose loss or gradient is no finite number. No weight is ever
    changed by one; `skip` goes on without it, but for three in a row."""
    logging_steps: int = Field(1, ge=1, le=1_000_000)
    save_steps: int | None = Field(None, ge=1, le=100_000_000)
    save_seconds: float = Field(60, gt=0, le=86_400)
    """A checkpoint at least this often, and at `save_steps`, and at the end."""
    keep_checkpoints: int = Field(2, ge=1, le=1000)
    eval_steps: int | None = Field(None, ge=1, le=100_000_000)
    """Where rows are held out: also at the end of each epoch."""
    best: Best | None = None
    """Early stopping, and which weights stay; rows have to be held out."""
    compare_rows: int = Field(200, ge=0, le=100_000)
    """Held-out rows, drawn by seed, on which the result is compared with the model as it began; 0
    leaves that out."""
    generated_rows: int = Field(0, ge=0, le=10_000)
    """Held-out rows, drawn by seed, that the model answers at each evaluation, for `eval_rougeL`
    and `eval_exact_match`; 0 leaves that out."""
    generated_tokens: int = Field(128, ge=1, le=MAX_LENGTH_LIMIT)
    """That such an answer may have."""

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        if self.parallel != "fsdp":
            return self
        if self.devices == 1:
            raise ValueError("fsdp shares a model out: devices has to be 2 or more")
        if self.quantization is not None:
            raise ValueError("quantized weights are not shared out: leave one of them out")
        if self.generated_rows:
            raise ValueError("with fsdp no answers are drawn: generated_rows has to be 0")
        return self


OnTwins = Literal["warn", "refuse"]


class Data(Strict):
    """How the rows of the data set, and of the one for validation, are read."""

    is_shareable: ClassVar[bool] = True
    """Whether a pass needs nothing of other processes' passes, so that each may hold a part of the
    model."""
    answers_rows: ClassVar[bool] = False
    """Whether what is trained answers what a row asks, with one answer that is right."""
    columns: Columns = {}
    """Mapped by hand, {"instruction": "question"}; then other columns are ignored."""
    eval_dataset: Name | None = None
    holdout: float = Field(0.0, ge=0, le=0.5)
    """Share of the rows that is kept back from training and evaluated instead, drawn by
    `optim.seed`; at least one row where it is above 0. Where there is no `eval_dataset`."""
    run: Run = Run()

    duplicates: OnTwins = "warn"
    """What becomes of a job whose data set, or eval_dataset, has rows that say the same."""
    overlap: OnTwins = "warn"
    """What becomes of one whose eval_dataset has rows that are trained on as well."""

    @model_validator(mode="after")
    def _check_holdout(self) -> Self:
        if self.holdout and self.eval_dataset is not None:
            raise ValueError("holdout and eval_dataset exclude each other; leave one of them out")
        if self.run.best is not None and not (self.holdout or self.eval_dataset):
            raise ValueError("run.best needs held-out rows: give an eval_dataset, or a holdout")
        if self.run.parallel == "fsdp" and not self.is_shareable:
            raise ValueError("run.parallel: fsdp is not for this method; write ddp")
        if self.run.generated_rows and not self.answers_rows:
            raise ValueError("run.generated_rows means nothing to this method; leave it out")
        return self


class Tuning(Data):
    """What all methods that tune a model on the rows of a file have in common."""

    sequences_a_sample: ClassVar[int] = 1
    """Each of up to `max_length` tokens."""
    model: Name
    dataset: Name
    max_length: int = Field(1024, ge=8, le=MAX_LENGTH_LIMIT)
    """Tokens. The model's own context, where it is shorter, holds."""
    overlong: Literal["drop", "truncate", "refuse"] = "drop"
    """What becomes of a sample over `max_length`: each is counted and reported, in every case."""
    lora: Lora | None = Lora()
    """None trains every weight."""
    optim: Optim = Optim()


class Sweepable(Tuning):
    """Methods of which several configurations can be trained side by side, as one job."""

    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if self.sweep is None:
            return self
        if self.lora is None:
            raise ValueError("a sweep steps adapters over one base: it needs lora")
        if self.run.devices > 1:
            raise ValueError("a sweep runs in one process: run.devices has to be 1")
        self.configurations()
        return self

    def configurations(self) -> dict[TrialName, Self]:
        """Of each trial of the sweep the whole specification, as if it were alone."""
        given = self.sweep.settings() if self.sweep is not None else {}
        return {name: self._with(name, settings) for name, settings in given.items()}

    def _with(self, name: str, settings: dict[str, object]) -> Self:
        """Raises ValueError."""
        lora = {key: value for key, value in settings.items() if key in LORA_SETTINGS}
        optim = {key: value for key, value in settings.items() if key not in LORA_SETTINGS}
        assert self.lora is not None
        own = {key: getattr(self, key) for key in self.model_fields_set}
        try:
            own |= {
                "sweep": None,
                "lora": Lora.model_validate({**_set(self.lora), **lora}),
                "optim": type(self.optim).model_validate({**_set(self.optim), **optim}),
            }
            return type(self).model_validate(own)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, fault["loc"]))
            raise ValueError(f"{name}: {where}: {fault['msg']}") from None


def _set(model: Strict) -> dict[str, object]:
    return {name: getattr(model, name) for name in type(model).model_fields}


class Sft(Sweepable):
    """Supervised fine-tuning on conversations, instructions or prompt and completion."""

    answers_rows: ClassVar[bool] = True
    method: Literal["sft"] = "sft"
    train_on: Literal["completions", "all"] = "completions"
    row_ranks: bool = False
    """Rows that have `target_modules` train an adapter of their own, of the row's `rank` where it
    has one, side by side with the others; with this, a `rank` by itself does so too."""


class PreferenceOptim(Optim):
    """The defaults of methods that start from a model that answers well already."""

    learning_rate: float = Field(5e-7, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)


class RewardOptim(Optim):
    learning_rate: float = Field(1e-4, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)


class Comparing(Sweepable):
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
    answers_rows: ClassVar[bool] = True
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

    is_shareable: ClassVar[bool] = False
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
    answers_rows: ClassVar[bool] = True
    method: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, le=1000)
    """Weight of the odds ratio beside the loss on the chosen sequence; lambda in the paper."""


class Cpo(Comparing):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417): no reference."""

    sequences_a_sample: ClassVar[int] = 2
    answers_rows: ClassVar[bool] = True
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
    answers_rows: ClassVar[bool] = True
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


class PretrainOptim(Optim):
    """A sample is a packed row."""

    learning_rate: float = Field(1e-3, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)
    batch_size: int = Field(8, ge=1, le=65_536)


class Pretrain(Data):
    """Next-token training on plain text, packed to rows of `sequence_length` tokens."""

    method: Literal["pretrain"] = "pretrain"
    model: Name
    """A folder with config.json and a tokenizer; weights where `from_scratch` is false."""
    dataset: Name
    tokenizer: Name | None = None
    """In place of the model's own: a folder, a tokenizer.json, or a SentencePiece .model."""
    clean: bool = False
    """Remove control characters; else a document that holds one is refused."""
    from_scratch: bool = True
    sequence_length: int = Field(256, ge=8, le=MAX_LENGTH_LIMIT)
    sampling: Sampling | None = None
    """Which documents are read, and how often; all of them once in an epoch where it is None.
    Those of an `eval_dataset` are all read."""
    keep_stages: int = Field(10, ge=0, le=1000)
    """With `run.save_steps` the model of each such step stays, as `step-<n>/` in the result; of
    more than so many the newest. 0: none does."""
    optim: PretrainOptim = PretrainOptim()


class ReinforcingOptim(Optim):
    """A sample is a completion: `batch_size` of them make an update, or a part of one."""

    learning_rate: float = Field(1e-6, gt=0, le=10)
    epochs: float = Field(1, gt=0, le=10_000)
    """Over the prompts."""
    batch_size: int = Field(64, ge=1, le=65_536)


class PpoOptim(ReinforcingOptim):
    learning_rate: float = Field(3e-6, gt=0, le=10)
    batch_size: int = Field(16, ge=1, le=65_536)


class Reinforcing(Tuning):
    """Methods that learn from completions of their own, which are rewarded. In rounds: completions
    are drawn, rewarded, and learnt from in one or more updates. Dropout is off."""

    is_shareable: ClassVar[bool] = False
    usual_beta: ClassVar[float] = 0.05
    num_generations: int = Field(1, ge=1, le=1024)
    """Completions of each prompt."""
    rewards: Annotated[tuple[RewardSource, ...], Field(min_length=1, max_length=16)] = (
        TrainedModel(),
    )
    """Their weighed sum is what is to grow. Where none is given, a reward model is trained first,
    from the rows' chosen and rejected answers, or from their scores."""
    rollout_batch_size: int = Field(8, ge=1, le=65_536)
    """Prompts of a round, on each device."""
    update_epochs: int = Field(1, ge=1, le=1000)
    """How often each completion of a round is learnt from."""
    max_completion_length: int = Field(512, ge=1, le=MAX_LENGTH_LIMIT)
    """Tokens. `max_length` holds prompt and completion: longer prompts are `overlong`, and where
    cut lose their beginning."""
    temperature: float = Field(1.0, gt=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 20)
    """0 keeps all."""
    epsilon: float = Field(0.2, gt=0, le=10)
    """How far from 1 the ratio of new to old probability may go before its gain is clipped."""
    beta: float | None = Field(None, ge=0, le=1000)
    """What a nat of divergence from the model as it was opened costs. None: 0.05; with grpo 0, or
    0.05 with a `kl_target`."""
    kl_target: float | None = Field(None, gt=0, le=1000)
    """Nats a token; where given, `beta` is adapted after each round to hold the divergence there
    (Ziegler et al. 2019, arXiv:1909.08593, section 2.2)."""
    kl_gain: float = Field(0.1, gt=0, le=5)
    """How fast `beta` follows; K in the paper."""
    mask_truncated: bool = False
    """Learn nothing from completions that were cut off at `max_completion_length`."""
    optim: ReinforcingOptim = ReinforcingOptim()

    @property
    def first_beta(self) -> float:
        if self.beta is not None:
            return self.beta
        return self.usual_beta or (0.05 if self.kl_target is not None else 0.0)

    @model_validator(mode="after")
    def _check_room(self) -> "Reinforcing":
        if self.max_completion_length >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length} holds prompt and completion: it has to be above "
                f"max_completion_length {self.max_completion_length}"
            )
        if sum(isinstance(source, TrainedModel) for source in self.rewards) > 1:
            raise ValueError("one reward model is trained first: name `trained` once")
        if self.kl_target is not None and self.beta == 0:
            raise ValueError("kl_target adapts beta, which then has to start above 0")
        return self


class Grouped(Reinforcing):
    """Methods that compare the completions of one prompt."""

    num_generations: int = Field(8, ge=2, le=1024)


class Grpo(Grouped):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300)."""

    usual_beta: ClassVar[float] = 0.0
    method: Literal["grpo"] = "grpo"
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """What a token weighs. dapo: each the same (Yu et al. 2025, arXiv:2503.14476, section 3.3);
    grpo: each completion the same; dr_grpo: each the same, over a constant number of tokens
    (Liu et al. 2025, arXiv:2503.20783, section 3.2)."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Whose standard deviation divides advantages. None: `none` with dr_grpo, else `group`."""
    epsilon_high: float | None = Field(None, gt=0, le=10)
    """Upper bound apart from `epsilon`, such as 0.28 (DAPO, section 3.1)."""
    drop_even_groups: bool = False
    """Leave out prompts whose completions all have the same reward (DAPO, section 3.2)."""

    @property
    def scale(self) -> Literal["group", "batch", "none"]:
        if self.scale_rewards is not None:
            return self.scale_rewards
        return "none" if self.loss == "dr_grpo" else "group"


class Rloo(Grouped):
    """REINFORCE with the other completions of a prompt as a baseline (Ahmadian et al. 2024,
    arXiv:2402.14740)."""

    method: Literal["rloo"] = "rloo"
    num_generations: int = Field(2, ge=2, le=1024)
    normalise_advantages: bool = False


class Ppo(Reinforcing):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with a value head on
    the policy's own last layer."""

    method: Literal["ppo"] = "ppo"
    rollout_batch_size: int = Field(64, ge=1, le=65_536)
    update_epochs: int = Field(4, ge=1, le=1000)
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438)."""
    value_weight: float = Field(0.1, ge=0, le=1000)
    """Of the value's loss beside the policy's."""
    value_epsilon: float = Field(0.2, gt=0, le=1e6)
    """How far a value may go from what it was before its gain is clipped."""
    whiten_rewards: bool = False
    optim: PpoOptim = PpoOptim()


AnySpec = Sft | Pretrain | Preference | Kto | Orpo | Cpo | Simpo | Reward | Grpo | Rloo | Ppo
TrainSpec = Annotated[AnySpec, Field(discriminator="method")]


def reward_training(spec: AnySpec) -> Reward | None:
    """What the job trains first: a reward model that begins as the policy does, on its rows."""
    if not isinstance(spec, Reinforcing):
        return None
    source = next((one for one in spec.rewards if isinstance(one, TrainedModel)), None)
    if source is None:
        return None
    alike = {name: getattr(spec, name) for name in Tuning.model_fields if name != "optim"}
    pace = source.model_dump(include={"learning_rate", "epochs", "batch_size"})
    return Reward(
        **alike | {"run": spec.run.model_copy(update={"best": None, "compare_rows": 0})},
        optim=RewardOptim(**pace, seed=spec.optim.seed),
        center=source.center,
    )


def reward_models(spec: AnySpec) -> tuple[str, ...]:
    """Names of the models that rewards come from, each once."""
    return models_in(rewards_of(spec))


def rewards_of(spec: AnySpec) -> tuple[RewardSource, ...]:
    return spec.rewards if isinstance(spec, Reinforcing) else ()

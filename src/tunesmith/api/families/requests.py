"""What the training contract's routes are asked: fields in its own words, and what they mean."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tunesmith.errors import BadRequestError
from tunesmith.spec.strict import Name
from tunesmith.spec.sweep import Sweep
from tunesmith.spec.train import (
    MAX_LENGTH_LIMIT,
    Best,
    Columns,
    Lora,
    MetricName,
    OnTwins,
    Optim,
    PairLoss,
    Preference,
    PreferenceOptim,
    Run,
    Sft,
    Sweepable,
    Target,
    check_pair_loss,
)


def _epochs(default: float) -> Any:
    return Field(default, gt=0, le=10_000, description="passes over the data")


def _learning_rate(default: float) -> Any:
    return Field(default, gt=0, le=10, description="the peak of the schedule")


_SPEC_WORDS = {
    "num_epochs": "epochs",
    "lr_scheduler": "scheduler",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
}
"""Of settings that can be swept, by this contract's words; the others are the same."""


def _in_spec_words(given: Any) -> Any:
    """A sweep's settings by the specification's names; what is no sweep is left as it is."""
    if not isinstance(given, dict):
        return given
    named = dict(given)
    if isinstance(grid := given.get("grid"), dict):
        named["grid"] = _renamed(grid)
    if isinstance(trials := given.get("trials"), list):
        named["trials"] = [_renamed(one) if isinstance(one, dict) else one for one in trials]
    return named


def _renamed(settings: dict[Any, Any]) -> dict[Any, Any]:
    return {_SPEC_WORDS.get(name, name): value for name, value in settings.items()}


class TuningRequest(BaseModel):
    """What to train, on what, and how. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model_name: Name = Field(
        description="a local folder (a full model, or a LoRA adapter made by an earlier job), "
        "a registered name, or a hub id",
        examples=["gpt2"],
    )
    dataset_path: Name = Field(
        description="a .json array, a .jsonl, .csv, .tsv or .parquet file, in the workspace or "
        "uploaded",
        examples=["data/my_dataset.json"],
    )
    output_dir: Name | None = Field(
        None, description="where the trained model goes; outputs/<job_id> where left out"
    )
    num_epochs: float = _epochs(3)
    max_steps: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="optimizer steps; may end before num_epochs",
    )
    batch_size: int = Field(4, ge=1, le=65_536, description="samples per device and step")
    learning_rate: float = _learning_rate(2e-5)
    use_lora: bool = Field(True, description="train low-rank adapters; false trains every weight")
    max_length: int = Field(
        1024,
        ge=8,
        le=MAX_LENGTH_LIMIT,
        description="tokens of a sample; the model's own context holds where it is shorter",
    )
    overlong: Literal["drop", "truncate", "refuse"] = Field(
        "drop", description="what becomes of a longer sample; it is counted and reported always"
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=65_536, description="batches whose gradients make one optimizer step"
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="of shuffling, dropout and new adapters")
    lora_r: int = Field(8, ge=1, le=1024, description="the adapters' rank")
    lora_alpha: float = Field(16, gt=0, le=65_536, description="adapters are scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="before the adapters")
    use_rslora: bool = Field(
        False, description="rank-stabilised: adapters are scaled by alpha / sqrt(r)"
    )
    use_dora: bool = Field(
        False, description="weight-decomposed: the lengths of the weights are trained by themselves"
    )
    lora_target_modules: (
        Literal["all-linear"] | Annotated[list[Target], Field(min_length=1, max_length=256)]
    ) = Field("all-linear", description="module names as PEFT takes them, or all linear layers")
    load_in_4bit: bool = Field(
        False,
        description="the base in 4 bits (NF4); on a CPU in full precision, and a warning says so",
    )
    load_in_8bit: bool = Field(
        False, description="the base in 8 bits; on a CPU in full precision, and a warning says so"
    )
    devices: int = Field(
        1, ge=1, le=1024, description="GPUs that share each step (on a CPU: processes)"
    )
    probe: bool = Field(
        False,
        description="make a step on the longest samples first, so that memory that does not "
        "suffice shows then",
    )
    eval_dataset_path: Name | None = Field(None, description="held-out data, same formats")
    holdout: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of the rows that is evaluated and not trained on, where no "
        "eval_dataset_path is given",
    )
    duplicates: OnTwins = Field(
        "warn", description="what becomes of a job with rows that say what an earlier row says"
    )
    overlap: OnTwins = Field(
        "warn", description="of one with rows of eval_dataset_path that are trained on as well"
    )
    columns: Columns = Field(
        {},
        description="field of a format → column of the files, mapped by hand; other columns are "
        "then ignored",
        examples=[{"instruction": "question", "output": "answer"}],
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="steps between evaluations of held-out rows; also after each epoch",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="evaluations in a row without a better one, after which training ends",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, le=1e9, description="what is no more than this better is not better"
    )
    load_best_model_at_end: bool | None = Field(
        None,
        description="the result has the weights of the best evaluation; left out, it has them "
        "where early_stopping_patience is given",
    )
    metric_for_best_model: MetricName = Field(
        "eval_loss", description="of an evaluation, with or without `eval_`"
    )
    greater_is_better: bool | None = Field(
        None, description="left out: less is better of losses and perplexity, more of the others"
    )
    compare_rows: int = Field(
        200,
        ge=0,
        le=100_000,
        description="held-out rows on which the result is compared with the model as it began",
    )
    generated_rows: int = Field(
        0,
        ge=0,
        le=10_000,
        description="held-out rows that the model answers at each evaluation, for eval_rougeL and "
        "eval_exact_match",
    )
    generated_tokens: int = Field(
        128, ge=1, le=MAX_LENGTH_LIMIT, description="that such an answer may have"
    )
    logging_steps: int = Field(1, ge=1, le=1_000_000, description="steps between reported losses")
    save_steps: int | None = Field(
        None, ge=1, le=100_000_000, description="steps between checkpoints; also every minute"
    )
    resume_from: Name | None = Field(
        None, description="a checkpoint folder of an earlier job to go on from"
    )
    sweep: Annotated[Sweep, BeforeValidator(_in_spec_words)] | None = Field(
        None,
        description="several configurations as one job, each an adapter over one base: a `grid` of "
        "values for a setting, or `trials` with what each has otherwise",
        examples=[{"grid": {"learning_rate": [1e-4, 2e-4], "lora_r": [4, 8]}}],
    )
    priority: int = Field(0, ge=-1000, le=1000, description="higher goes first, then older")
    suffix: str | None = Field(
        None, max_length=64, pattern=r"^[\w.\-]+$", description="part of the tuned model's name"
    )

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if self.sweep is not None:
            try:
                self.to_spec()
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]["msg"]
                raise ValueError(f"sweep: {fault.removeprefix('Value error, ')}") from None
        return self

    def to_spec(self) -> Sweepable:
        """Raises BadRequestError."""
        raise NotImplementedError

    def _tuning(self) -> dict[str, Any]:
        """The fields that every method has in its specification, but for `optim`."""
        if self.holdout and self.eval_dataset_path is not None:
            raise BadRequestError("holdout and eval_dataset_path exclude each other; give one")
        if self.load_in_4bit and self.load_in_8bit:
            raise BadRequestError("load_in_4bit and load_in_8bit exclude each other")
        targets = self.lora_target_modules
        lora = Lora(
            rank=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            targets=targets if isinstance(targets, str) else tuple(targets),
        )
        return {
            "model": self.model_name,
            "dataset": self.dataset_path,
            "eval_dataset": self.eval_dataset_path,
            "holdout": self.holdout,
            "duplicates": self.duplicates,
            "overlap": self.overlap,
            "columns": self.columns,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "lora": lora if self.use_lora else None,
            "sweep": self.sweep,
            "run": self._run(),
        }

    def _optim(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "epochs": self.num_epochs,
            "max_steps": self.max_steps,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "scheduler": self.lr_scheduler,
            "warmup_ratio": self.warmup_ratio,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        }

    def _best(self) -> Best | None:
        """Raises BadRequestError."""
        keep = self.load_best_model_at_end
        if not keep and self.early_stopping_patience is None:
            return None
        if not self.holdout and self.eval_dataset_path is None:
            raise BadRequestError(
                "early_stopping_patience and load_best_model_at_end need held-out rows: give "
                "eval_dataset_path, or holdout"
            )
        named = self.metric_for_best_model.removeprefix("eval_")
        return Best(
            metric=f"eval_{named}",
            greater_is_better=self.greater_is_better,
            patience=self.early_stopping_patience,
            min_delta=self.early_stopping_threshold,
            keep=keep is not False,
        )

    def _run(self) -> Run:
        if self.generated_rows and not self.holdout and self.eval_dataset_path is None:
            raise BadRequestError(
                "generated_rows are held-out rows: give eval_dataset_path, or holdout"
            )
        bits: Literal["4bit", "8bit"] | None = "8bit" if self.load_in_8bit else None
        return Run(
            quantization="4bit" if self.load_in_4bit else bits,
            devices=self.devices,
            probe=self.probe,
            eval_steps=self.eval_steps,
            best=self._best(),
            compare_rows=self.compare_rows,
            generated_rows=self.generated_rows,
            generated_tokens=self.generated_tokens,
            logging_steps=self.logging_steps,
            save_steps=self.save_steps,
        )


class SftRequest(TuningRequest):
    """Supervised fine-tuning."""

    train_on: Literal["completions", "all"] = Field(
        "completions", description="learn the answers only, or every token"
    )

    def to_spec(self) -> Sft:
        """Raises BadRequestError."""
        return Sft(**self._tuning(), optim=Optim(**self._optim()), train_on=self.train_on)


class DpoRequest(TuningRequest):
    """Direct preference optimisation, on prompt, chosen and rejected."""

    num_epochs: float = _epochs(1)
    learning_rate: float = _learning_rate(5e-7)
    beta: float = Field(
        0.1, gt=0, le=1000, description="how dear it is to leave the model as it was"
    )
    loss: PairLoss = Field("sigmoid", description="what is made of a pair's log-ratios")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs taken to be the wrong way round (sigmoid, robust, exo_pair)",
    )
    length_normalised: bool = Field(
        False, description="log-ratios for each token of an answer; always so with ipo"
    )

    @model_validator(mode="after")
    def _check_loss(self) -> "DpoRequest":
        check_pair_loss(self.loss, self.label_smoothing, self.length_normalised)
        return self

    def to_spec(self) -> Preference:
        """Raises BadRequestError."""
        return Preference(
            **self._tuning(),
            optim=PreferenceOptim(**self._optim()),
            loss=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            length_normalised=self.length_normalised,
        )

"""What a task's configuration may say: each thing once, with its spellings and its place.

A key is known to a task where the task's specification has its place; so a field that a
specification gains is offered by a line here. What HF's trainers, TRL, PEFT and their like call
a thing is an alias of it; two spellings of one thing in one file are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.spec.tasks import readings
from tunesmith.spec.tasks.readings import Reading

OUTPUT_DIR = "output_dir"
GLOBAL_BATCH = "global_batch_size"
"""Places that no specification has: what they say is said in another way."""


@dataclass(frozen=True)
class Key:
    name: str
    place: str
    """In the specification, dotted."""
    told: str
    """What it is, in a few words."""
    aliases: tuple[str, ...] = ()
    read: Reading = readings.plainly
    is_shorthand: bool = False
    """Another key has the same place and says it in full."""

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def _key(name: str, place: str, told: str, aliases: str = "", **more: object) -> Key:
    return Key(name, place, told, tuple(aliases.split()), **more)  # type: ignore[arg-type]


def _sweep(value: Any) -> Any:
    """Settings of a grid, or of trials, under any of the keys' spellings."""
    if not isinstance(value, dict):
        return value
    inner = [key for key in KEYS if key.place.startswith(("lora.", "optim."))]
    named = {word: key.place.partition(".")[2] for key in inner for word in key.spellings}
    return {
        part: [_renamed(one, named) for one in told]
        if isinstance(told, list)
        else _renamed(told, named)
        for part, told in value.items()
    }


def _renamed(settings: Any, named: Mapping[str, str]) -> Any:
    """Raises ValueError where two words come to say one thing."""
    if not isinstance(settings, dict):
        return settings
    found = {named.get(word, word): value for word, value in settings.items()}
    if len(found) < len(settings):
        raise ValueError(f"two of {', '.join(settings)} say one thing; keep one of them")
    return found


_PRECISIONS = {
    "no": "fp32",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "false": "fp32",
}
_SCHEDULERS = {"constant_with_warmup": "constant"}

KEYS: tuple[Key, ...] = (
    # what is trained, on what, and where it goes
    _key(
        "model_name",
        "model",
        "what is tuned: a folder, a registered name, a hub id",
        "base_model policy_model model model_name_or_path pretrained_model_name_or_path "
        "model_path model_id base_model_name_or_path",
    ),
    _key(
        "dataset",
        "dataset",
        "the rows to learn from: a file, a registered name, org/name or org/name/file of the hub",
        "dataset_path dataset_name train_dataset train_dataset_path train_file training_file "
        "data data_path",
    ),
    _key(
        "eval_dataset",
        "eval_dataset",
        "rows that are only measured on",
        "eval_dataset_path eval_file validation_dataset validation_file val_dataset",
    ),
    _key(
        "holdout",
        "holdout",
        "share of the rows that is only measured on, where no eval_dataset is given",
        "eval_split validation_split val_size test_size eval_ratio",
    ),
    _key(
        "tokenizer",
        "tokenizer",
        "a folder, a tokenizer.json or a SentencePiece .model, in place of the model's own",
        "tokenizer_path tokenizer_name tokenizer_name_or_path tokenizer_model",
    ),
    _key("columns", "columns", "field of a format → column of the file"),
    _key("duplicates", "duplicates", "warn or refuse where rows say the same"),
    _key("overlap", "overlap", "warn or refuse where rows of eval_dataset are trained on too"),
    _key("output_dir", OUTPUT_DIR, "where the result goes", "output_path"),
    _key(
        "sampling",
        "sampling",
        "which documents are read (`where`), and how often (`weights`), by their metadata",
        "sampler",
    ),
    _key("clean", "clean", "remove control characters", "clean_text"),
    _key("from_scratch", "from_scratch", "new weights, or go on from the model's"),
    # how far, and by what steps
    _key("learning_rate", "optim.learning_rate", "the schedule's peak", "lr"),
    _key(
        "num_train_epochs",
        "optim.epochs",
        "passes over the data",
        "epochs num_epochs n_epochs epoch",
    ),
    _key(
        "max_steps",
        "optim.max_steps",
        "optimizer steps that end it sooner; -1: none",
        "max_train_steps num_train_steps",
        read=readings.steps,
    ),
    _key(
        "per_device_train_batch_size",
        "optim.batch_size",
        "samples a device and accumulation step",
        "train_batch_size batch_size per_device_batch_size batch micro_batch_size",
    ),
    _key(
        "gradient_accumulation_steps",
        "optim.gradient_accumulation_steps",
        "batches whose gradients make one step",
        "accumulation accumulation_steps grad_accumulation_steps gradient_accumulation",
    ),
    _key(
        "global_batch_size",
        GLOBAL_BATCH,
        "samples a step: batch × devices × accumulation",
        "effective_batch_size total_batch_size",
    ),
    _key(
        "max_seq_length",
        "max_length",
        "tokens of a sample; the model's context where that is shorter",
        "sequence_length max_length length max_seq_len seq_length seq_len block_size cutoff_len "
        "context_length model_max_length",
    ),
    _key(
        "sequence_length",
        "sequence_length",
        "tokens of a packed row; the model's context where that is shorter",
        "max_seq_length max_length length max_seq_len seq_length seq_len block_size cutoff_len "
        "context_length model_max_length",
    ),
    _key("overlong", "overlong", "drop, truncate or refuse longer samples"),
    _key("seed", "optim.seed", "of order, dropout and new weights", "random_seed"),
    _key(
        "lr_scheduler_type",
        "optim.scheduler",
        "cosine, linear or constant",
        "lr_scheduler scheduler learning_rate_schedule",
        read=readings.words(_SCHEDULERS),
    ),
    _key(
        "warmup_ratio", "optim.warmup_ratio", "share of the steps that warm up", "warmup_fraction"
    ),
    _key(
        "warmup_steps",
        "optim.warmup_steps",
        "steps that warm up; wins over the ratio",
        "num_warmup_steps lr_warmup_steps",
    ),
    _key("weight_decay", "optim.weight_decay", "AdamW's"),
    _key("adam_beta1", "optim.beta1", "AdamW's", "beta1"),
    _key("adam_beta2", "optim.beta2", "AdamW's", "beta2"),
    _key("adam_epsilon", "optim.epsilon", "AdamW's", "adam_eps"),
    _key(
        "max_grad_norm",
        "optim.max_grad_norm",
        "where gradients are clipped; 0: nowhere",
        "gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
    ),
    # what is kept and told
    _key("save_steps", "run.save_steps", "steps between checkpoints", "checkpoint_steps"),
    _key("save_seconds", "run.save_seconds", "seconds between checkpoints, at most"),
    _key(
        "save_total_limit",
        "run.keep_checkpoints",
        "checkpoints that are kept",
        "keep_checkpoints",
    ),
    _key("keep_stages", "keep_stages", "with save_steps: models on the way that stay, `step-<n>/`"),
    _key("logging_steps", "run.logging_steps", "steps between reported losses", "log_steps"),
    _key("eval_steps", "run.eval_steps", "steps between evaluations; also after each epoch"),
    _key(
        "metric_for_best_model",
        "run.best.metric",
        "by which evaluations are compared: eval/loss and the like",
        read=readings.evaluated,
    ),
    _key("greater_is_better", "run.best.greater_is_better", "whether more of it is better"),
    _key(
        "early_stopping_patience",
        "run.best.patience",
        "evaluations in a row without a better one, after which it ends",
    ),
    _key(
        "early_stopping_threshold",
        "run.best.min_delta",
        "what is no more than this better, is not better",
    ),
    _key(
        "load_best_model_at_end",
        "run.best.keep",
        "the result has the weights of the best evaluation",
    ),
    _key(
        "generated_rows",
        "run.generated_rows",
        "held-out rows that the model answers at each evaluation, for eval/rougeL",
    ),
    _key(
        "generated_tokens",
        "run.generated_tokens",
        "that such an answer may have",
        "generation_max_new_tokens generation_max_length",
    ),
    _key("compare_rows", "run.compare_rows", "held-out rows on which base and result are compared"),
    # by what means
    _key(
        "precision",
        "run.precision",
        "auto, fp32, bf16 or fp16",
        "mixed_precision torch_dtype dtype",
        read=readings.words(_PRECISIONS),
    ),
    _key("bf16", "run.precision", "precision: bf16", read=readings.flag("bf16"), is_shorthand=True),
    _key("fp16", "run.precision", "precision: fp16", read=readings.flag("fp16"), is_shorthand=True),
    _key(
        "gradient_checkpointing",
        "run.gradient_checkpointing",
        "auto, on or off; true and false too",
        "activation_checkpointing",
        read=readings.switch,
    ),
    _key(
        "torch_compile",
        "run.compile",
        "auto, on or off; true and false too",
        "compile",
        read=readings.switch,
    ),
    _key("devices", "run.devices", "GPUs that share each step", "num_gpus n_gpus num_devices"),
    _key(
        "on_nan",
        "run.on_nan",
        "at a step whose loss or gradient is no finite number: fail, or skip it",
    ),
    _key("parallel", "run.parallel", "what each device holds: auto, ddp (a copy), fsdp (a part)"),
    _key("probe", "run.probe", "make a step on the longest samples first"),
    _key("quantization", "run.quantization", "the base's weights in 4bit or 8bit"),
    _key(
        "use_8bit",
        "run.quantization",
        "quantization: 8bit",
        "load_in_8bit",
        read=readings.flag("8bit"),
        is_shorthand=True,
    ),
    _key(
        "use_4bit",
        "run.quantization",
        "quantization: 4bit",
        "load_in_4bit",
        read=readings.flag("4bit"),
        is_shorthand=True,
    ),
    # adapters
    _key(
        "use_lora",
        "lora",
        "train low-rank adapters, not every weight",
        "use_peft",
        read=readings.flag({}, False),
        is_shorthand=True,
    ),
    _key("lora_r", "lora.rank", "the adapters' rank", "lora_rank rank r peft_lora_r"),
    _key("lora_alpha", "lora.alpha", "adapters are scaled by alpha / rank", "peft_lora_alpha"),
    _key("lora_dropout", "lora.dropout", "before the adapters"),
    _key("use_rslora", "lora.use_rslora", "scaled by alpha / √rank", "rslora"),
    _key("use_dora", "lora.use_dora", "lengths of weights apart from directions", "dora"),
    _key(
        "peft_target_modules",
        "lora.targets",
        "module names as PEFT takes them, or all-linear",
        "target_modules lora_target_modules lora_target lora_targets",
        read=readings.modules,
    ),
    _key(
        "bnb_4bit_quant_type",
        "run.quantization",
        "nf4",
        read=readings.only("nf4", "write nf4: it is the only 4-bit type here"),
        is_shorthand=True,
    ),
    _key(
        "sweep",
        "sweep",
        "several configurations side by side: a `grid` of values, or `trials`",
        read=_sweep,
    ),
    # supervised
    _key("train_on", "train_on", "completions, or all tokens"),
    _key(
        "train_on_inputs",
        "train_on",
        "train_on: all",
        read=readings.flag("all", "completions"),
        is_shorthand=True,
    ),
    _key("row_ranks", "row_ranks", "a row's rank alone names an adapter too"),
    # preferences and reinforcement
    _key(
        "beta",
        "beta",
        "how dear it is to leave the reference",
        "dpo_beta kl_coef kl_coeff init_kl_coef",
    ),
    _key("loss", "loss", "which of the method's losses", "loss_type dpo_loss"),
    _key("label_smoothing", "label_smoothing", "share of pairs taken to be the wrong way round"),
    _key("length_normalised", "length_normalised", "log-ratios by token", "length_normalized"),
    _key("desirable_weight", "desirable_weight", "weight of wanted answers"),
    _key("undesirable_weight", "undesirable_weight", "weight of unwanted answers"),
    _key("alpha", "alpha", "weight of the loss on the chosen answer", "cpo_alpha"),
    _key("gamma", "gamma", "simpo: the chosen answer's margin; ppo: the discount", "simpo_gamma"),
    _key(
        "center",
        "center",
        "weight of what draws scores to 0",
        "center_rewards_coefficient",
    ),
    _key(
        "rewards",
        "rewards",
        "what completions are rewarded for: names, or mappings with `kind`",
        "reward reward_funcs",
        read=readings.rewards,
    ),
    _key(
        "reward_model",
        "rewards",
        "a reward model, or the URL of a reward service, as the one reward",
        "reward_model_path reward_model_name_or_path",
        read=readings.reward_model,
        is_shorthand=True,
    ),
    _key("num_generations", "num_generations", "completions of a prompt", "group_size"),
    _key("rollout_batch_size", "rollout_batch_size", "prompts of a round, on each device"),
    _key(
        "update_epochs",
        "update_epochs",
        "how often a round's completions are learnt from",
        "ppo_epochs num_ppo_epochs num_iterations",
    ),
    _key(
        "max_completion_length",
        "max_completion_length",
        "tokens of a completion; max_seq_length holds the prompt too",
        "max_new_tokens response_length max_response_length",
    ),
    _key("temperature", "temperature", "of drawing"),
    _key("top_p", "top_p", "of drawing"),
    _key("top_k", "top_k", "of drawing; 0 keeps all"),
    _key(
        "clip_range",
        "epsilon",
        "how far a probability's ratio may go before its gain is clipped",
        "epsilon cliprange clip_epsilon eps_clip",
    ),
    _key("clip_range_high", "epsilon_high", "the same, upwards", "epsilon_high"),
    _key("kl_target", "kl_target", "nats a token that beta is adapted to hold", "target_kl"),
    _key("kl_gain", "kl_gain", "how fast beta follows"),
    _key(
        "mask_truncated",
        "mask_truncated",
        "learn nothing from completions that were cut off",
        "mask_truncated_completions",
    ),
    _key(
        "scale_rewards",
        "scale_rewards",
        "whose deviation advantages are divided by: group, batch, none",
        read=readings.words({"true": "group", "false": "none"}),
    ),
    _key("drop_even_groups", "drop_even_groups", "leave out prompts whose rewards are all equal"),
    _key(
        "normalise_advantages",
        "normalise_advantages",
        "advantages of a round to mean 0 and deviation 1",
        "normalize_advantages whiten_advantages",
    ),
    _key("gae_lambda", "lam", "of generalised advantage estimation", "lam"),
    _key("vf_coef", "value_weight", "weight of the value's loss", "value_weight"),
    _key(
        "cliprange_value",
        "value_epsilon",
        "how far a value may go before its gain is clipped",
        "value_epsilon value_clip",
    ),
    _key("whiten_rewards", "whiten_rewards", "rewards of a round to deviation 1"),
)
"""In the order in which they are told."""

"""How much memory and disk a job will want: estimates for admission, on the careful side."""

from collections.abc import Sequence

from tunesmith.hub.folder import Matrix, ModelFolder
from tunesmith.spec.records import Needs
from tunesmith.spec.rewards import functions_bytes
from tunesmith.spec.train import (
    Lora,
    Pretrain,
    Reinforcing,
    Reward,
    Run,
    Sweepable,
    TrainSpec,
    reward_training,
    rewards_of,
)

PROCESS_BYTES = 400 << 20
"""A trainer with torch and transformers imported, much of it shared with its fork's parent."""
MAX_BYTES = 1 << 60
"""What a configuration may pretend to want: no host has it, every database can hold it."""
MICRO_BATCH_TOKENS = 2048
"""Tokens whose activations are alive at once, at least; more where one sample is longer."""


def of(
    spec: TrainSpec,
    model: ModelFolder,
    has_gpu: bool = False,
    rewarding: Sequence[ModelFolder] = (),
) -> Needs:
    """Weights, gradients and optimizer state in fp32, activations of one micro-batch, logits; the
    weights of models that reward, too, and of a reward model's own training, where that is more."""
    weights = 4 * parameters(spec, model) + 12 * trained(spec, model) + _reference(spec, model)
    weights += sum(4 * (one.parameters + one.adapter_parameters) for one in rewarding)
    each = PROCESS_BYTES + weights + _activations(spec, model)
    first = reward_training(spec)
    if first is not None:
        alone = of(first.model_copy(update={"run": Run()}), model).memory_bytes
        each = max(alone, each + 4 * parameters(first, model))
    if not has_gpu:
        each += functions_bytes(rewards_of(spec))
    return Needs(
        gpus=spec.run.devices if has_gpu else 0,
        memory_bytes=min(each * (1 if has_gpu else spec.run.devices), MAX_BYTES),
    )


def _reference(spec: TrainSpec, model: ModelFolder) -> int:
    """What is trained, once more as it was opened, where completions are compared with that."""
    return 4 * trained(spec, model) if isinstance(spec, Reinforcing) else 0


def disk_bytes(spec: TrainSpec, model: ModelFolder) -> int:
    """Checkpoints that are kept, one being written, and the artifact."""
    kept = (spec.run.keep_checkpoints + 1) * checkpoint_bytes(spec, model)
    models = 4 * trained(spec, model) * (1 + _stages(spec))
    return kept + models + _taught(spec, model) + (16 << 20)


def _stages(spec: TrainSpec) -> int:
    """Models on the way that stay."""
    every = spec.run.save_steps
    if not isinstance(spec, Pretrain) or every is None:
        return 0
    most = spec.optim.max_steps
    return spec.keep_stages if most is None else min(spec.keep_stages, most // every)


def _taught(spec: TrainSpec, model: ModelFolder) -> int:
    """The weights of a reward model that was trained first."""
    first = reward_training(spec)
    return 0 if first is None else 4 * trained(first, model)


def checkpoint_bytes(spec: TrainSpec, model: ModelFolder) -> int:
    """Weights in training, and the two moments that the optimizer keeps of each, in fp32."""
    return 12 * trained(spec, model) + _taught(spec, model)


def trained(spec: TrainSpec, model: ModelFolder) -> int:
    """Parameters in training: counted where the folder's weights tell, else estimated.

    Those of all configurations, where several are trained side by side.
    """
    if isinstance(spec, Sweepable) and spec.sweep is not None:
        return sum(trained(one, model) for one in spec.configurations().values())
    lora = None if isinstance(spec, Pretrain) else spec.lora
    if lora is None:
        return parameters(spec, model)
    head = _score(spec, model)
    if model.adapter_parameters:
        return model.adapter_parameters + head
    if model.matrices:
        sides = sum(one.sides for one in model.matrices if _is_target(one, lora))
        return lora.rank * sides + head
    width = model.size("hidden_size", "n_embd") or 1024
    inner = model.size("intermediate_size", "n_inner") or 4 * width
    layers = model.size("num_hidden_layers", "n_layer") or 12
    return int(layers * lora.rank * (8 * width + 3 * (width + inner)))


def parameters(spec: TrainSpec, model: ModelFolder) -> int:
    """Of the whole model."""
    if model.parameters and not (isinstance(spec, Pretrain) and spec.from_scratch):
        return model.parameters + _score(spec, model)
    width = model.size("hidden_size", "n_embd") or 1024
    inner = model.size("intermediate_size", "n_inner") or 4 * width
    layers = model.size("num_hidden_layers", "n_layer") or 12
    vocabulary = model.size("vocab_size") or 50_000
    tables = 1 if model.config.get("tie_word_embeddings") else 2
    return layers * (_attention(model, width) + 3 * width * inner) + tables * vocabulary * width


def _score(spec: TrainSpec, model: ModelFolder) -> int:
    """A reward model's head, where it is new; a head of the model's own is taken off."""
    is_scoring = any("SequenceClassification" in str(one) for one in model.architectures)
    return model.size("hidden_size", "n_embd") if isinstance(spec, Reward) and not is_scoring else 0


def _attention(model: ModelFolder, width: int) -> int:
    """Of one layer: queries and the way out are as wide as the heads, keys and values may be
    narrower."""
    heads = model.size("num_attention_heads", "n_head") or 1
    head = model.size("head_dim") or width // heads
    shared = model.size("num_key_value_heads") or heads
    return 2 * width * head * (heads + shared)


def _is_target(matrix: Matrix, lora: Lora) -> bool:
    if lora.targets == "all-linear":
        return True
    return any(f".{matrix.module}".endswith(f".{target}") for target in lora.targets)


def _activations(spec: TrainSpec, model: ModelFolder) -> int:
    width = model.size("hidden_size", "n_embd") or 1024
    inner = model.size("intermediate_size", "n_inner") or 4 * width
    layers = model.size("num_hidden_layers", "n_layer") or 12
    longest = spec.sequence_length if isinstance(spec, Pretrain) else spec.max_length
    sequences = 1 if isinstance(spec, Pretrain) else spec.sequences_a_sample
    sample = sequences * min(longest, model.context_length or longest)
    tokens = max(MICRO_BATCH_TOKENS, sample)
    return 4 * tokens * layers * (12 * width + 4 * inner)

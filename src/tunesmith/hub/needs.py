"""How much memory and disk a job will want: estimates for admission, on the careful side."""

from tunesmith.hub.folder import ModelFolder
from tunesmith.spec.records import Needs
from tunesmith.spec.train import Pretrain, TrainSpec

PROCESS_BYTES = 400 << 20
"""A trainer with torch and transformers imported, much of it shared with its fork's parent."""
MAX_BYTES = 1 << 60
"""What a configuration may pretend to want: no host has it, every database can hold it."""
MICRO_BATCH_TOKENS = 2048
"""Tokens whose activations are alive at once, at least; more where one sample is longer."""


def of(spec: TrainSpec, model: ModelFolder, has_gpu: bool = False) -> Needs:
    """Weights, gradients and optimizer state in fp32, activations of one micro-batch, logits."""
    parameters = _parameters(spec, model)
    trained = _trained(spec, parameters, model)
    weights = 4 * parameters + 12 * trained
    each = PROCESS_BYTES + weights + _activations(spec, model)
    return Needs(
        gpus=spec.run.devices if has_gpu else 0,
        memory_bytes=min(each * (1 if has_gpu else spec.run.devices), MAX_BYTES),
    )


def disk_bytes(spec: TrainSpec, model: ModelFolder) -> int:
    """Checkpoints that are kept, one being written, and the artifact."""
    parameters = _parameters(spec, model)
    trained = _trained(spec, parameters, model)
    return (spec.run.keep_checkpoints + 1) * 12 * trained + 4 * trained + (16 << 20)


def _trained(spec: TrainSpec, parameters: int, model: ModelFolder) -> int:
    lora = None if isinstance(spec, Pretrain) else spec.lora
    if lora is None:
        return parameters
    width = model.size("hidden_size", "n_embd") or 1024
    inner = model.size("intermediate_size", "n_inner") or 4 * width
    layers = model.size("num_hidden_layers", "n_layer") or 12
    return int(layers * lora.rank * (8 * width + 3 * (width + inner)))


def _parameters(spec: TrainSpec, model: ModelFolder) -> int:
    if model.parameters and not (isinstance(spec, Pretrain) and spec.from_scratch):
        return model.parameters
    width = model.size("hidden_size", "n_embd") or 1024
    inner = model.size("intermediate_size", "n_inner") or 4 * width
    layers = model.size("num_hidden_layers", "n_layer") or 12
    vocabulary = model.size("vocab_size") or 50_000
    return layers * (4 * width * width + 3 * width * inner) + 2 * vocabulary * width


def _activations(spec: TrainSpec, model: ModelFolder) -> int:
    width = model.size("hidden_size", "n_embd") or 1024
    inner = model.size("intermediate_size", "n_inner") or 4 * width
    layers = model.size("num_hidden_layers", "n_layer") or 12
    longest = spec.sequence_length if isinstance(spec, Pretrain) else spec.max_length
    sequences = 1 if isinstance(spec, Pretrain) else spec.sequences_a_sample
    sample = sequences * min(longest, model.context_length or longest)
    tokens = max(MICRO_BATCH_TOKENS, sample)
    return 4 * tokens * layers * (12 * width + 4 * inner)

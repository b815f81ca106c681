"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 with a forward pass of our own, on a CPU in fp32.

The weights come and go under transformers' names, bit for bit; adapters under PEFT's.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.nn import gpt2, llama
from tunesmith.nn.adapters import (
    AdapterPlan,
    check_fit,
    copy_into,
    plan_known,
    plan_new,
    published_name,
    save_adapter,
)
from tunesmith.nn.batch import FlatBatch
from tunesmith.nn.cross_entropy import linear_cross_entropy_sum
from tunesmith.nn.folder import ModelFolder
from tunesmith.nn.hosted import context_length
from tunesmith.nn.kernels import Kernels, compiled
from tunesmith.nn.matmul import SHAPE_STEP, is_onednn
from tunesmith.nn.opening import Opening, load_config, new_model
from tunesmith.nn.projection import Projection
from tunesmith.nn.weights import read_file, read_tensors, write_tensors

HEAD = "lm_head.weight"


class Stack(Protocol):
    embedding_name: str
    plain: dict[str, nn.Parameter]
    """Weights that are no projection, under transformers' names."""
    should_checkpoint: bool
    kernels: Kernels

    @property
    def projections(self) -> list[Projection]: ...

    def hidden_rows(self, batch: FlatBatch, is_training: bool) -> Tensor: ...


class LeanModel:
    """See `LanguageModel`."""

    is_lean = True

    def __init__(
        self, config: Any, stack: Stack, head_VH: nn.Parameter | None, plan: AdapterPlan | None
    ) -> None:
        """`plan` None trains every weight; else the stack's projections have its adapters."""
        self._config = config
        self._stack = stack
        self._plan = plan
        self._is_training = True
        self._plain = dict(stack.plain)
        if head_VH is not None:
            self._plain[HEAD] = head_VH
        for one in self._plain.values():
            one.requires_grad_(plan is None)
        self._head_VH = self._plain.get(HEAD, self._plain[stack.embedding_name])
        self.context_length = context_length(config)
        self.vocabulary_size = int(self._plain[stack.embedding_name].shape[0])
        self._trainable = self._find_trainable()
        self.parameters_total = sum(tensor.numel() for tensor in self._published().values()) + sum(
            one.numel() for name, one in self._trainable.items() if ".lora_" in name
        )

    def loss_sum(self, batch: FlatBatch) -> Tensor:
        if not batch.labels:
            return self._head_VH.new_zeros(()).requires_grad_()
        batch = _rounded(batch, is_onednn(self._head_VH))
        hidden_RH = self._stack.hidden_rows(batch, self._is_training)
        return linear_cross_entropy_sum(hidden_RH, self._head_VH, batch.targets_R)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._trainable)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in self._kept().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self._kept()
        assert own.keys() == weights.keys(), sorted(own.keys() ^ weights.keys())[:4]
        for name, tensor in own.items():
            copy_into(tensor, weights[name])

    def save(self, folder: Path) -> None:
        if self._plan is not None:
            save_adapter(folder, self._plan, self._adapters())
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._config.architectures = [_ARCHITECTURES[self._config.model_type]]
        self._config.dtype = torch.float32
        self._config.save_pretrained(str(folder))
        write_tensors(folder, self._published())
        generation = Path(str(self._config.name_or_path)) / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)

    def train(self) -> None:
        self._is_training = True

    def eval(self) -> None:
        self._is_training = False

    def _kept(self) -> dict[str, Tensor]:
        """Views of the model's own memory."""
        return self._published() if self._plan is None else self._adapters()

    def _published(self) -> dict[str, Tensor]:
        state = {name: one.detach() for name, one in self._plain.items()}
        for projection in self._stack.projections:
            state |= projection.published()
        return state

    def _adapters(self) -> dict[str, Tensor]:
        return {published_name(name): one.detach() for name, one in self._trainable.items()}

    def _find_trainable(self) -> dict[str, nn.Parameter]:
        found = {name: one for name, one in self._plain.items() if one.requires_grad}
        for projection in self._stack.projections:
            found |= projection.trainable()
        return found


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_NO_PROJECTION = {"lm_head", "embed_tokens", "wte", "wpe"}
"""Targets that only PEFT can put an adapter on."""


def open_lean(folder: ModelFolder, opening: Opening) -> LeanModel | None:
    """None where the architecture, the device or the adapter asks for transformers itself.

    Raises JobFailure(USER_ERROR).
    """
    if opening.device != "cpu" or opening.precision != "fp32" or opening.quantization:
        return None
    config = load_config(folder)
    family = next((one for one in (llama, gpt2) if one.is_served(config)), None)
    if family is None:
        return None
    modules = family.module_names(config)
    plan = _plan(folder, opening, modules, is_transposed=family is gpt2)
    if plan is None and (folder.adapter is not None or opening.lora is not None):
        return None
    built = _build(config, _state(config, folder, opening))
    if built is None:
        return None
    stack, head_VH = built
    stack.should_checkpoint = opening.gradient_checkpointing
    if opening.should_compile:
        stack.kernels = compiled()
    return _with_adapters(config, stack, head_VH, plan, folder, opening)


def _plan(
    folder: ModelFolder, opening: Opening, modules: list[str], *, is_transposed: bool
) -> AdapterPlan | None:
    if folder.adapter is not None:
        return plan_known(folder, modules)
    lora = opening.lora
    if lora is None:
        return None
    if not isinstance(lora.targets, str) and any(
        target.rsplit(".", 1)[-1] in _NO_PROJECTION for target in lora.targets
    ):
        return None
    return plan_new(lora, folder, modules, is_transposed)


def _state(config: Any, folder: ModelFolder, opening: Opening) -> dict[str, Tensor]:
    if opening.from_scratch:
        return dict(new_model(config, opening.seed).state_dict())
    state = read_tensors(folder.base)
    prefix = "transformer." if config.model_type == "gpt2" else "model."
    if any(name.startswith(prefix) for name in state):
        return state
    return {name if name == HEAD else prefix + name: tensor for name, tensor in state.items()}


def _build(config: Any, state: Mapping[str, Tensor]) -> tuple[Stack, nn.Parameter | None] | None:
    """None where the tensors are not the ones that the config's architecture has."""
    kind = gpt2.Gpt2Stack if config.model_type == "gpt2" else llama.LlamaStack
    try:
        stack = kind(config, state)
        if config.tie_word_embeddings:
            embedding = state[kind.embedding_name]
            is_tied = torch.equal(state.get(HEAD, embedding), embedding)
            return (stack, None) if is_tied else None
        return stack, nn.Parameter(state[HEAD].float().clone())
    except KeyError:
        return None


def _with_adapters(
    config: Any,
    stack: Stack,
    head_VH: nn.Parameter | None,
    plan: AdapterPlan | None,
    folder: ModelFolder,
    opening: Opening,
) -> LeanModel:
    if plan is None:
        return LeanModel(config, stack, head_VH, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(opening.seed)
        for projection in stack.projections:
            projection.adapt(plan.modules, plan.shape)
    model = LeanModel(config, stack, head_VH, plan)
    if folder.adapter is not None:
        found = read_file(folder.adapter / "adapter_model.safetensors")
        check_fit(model.weights(), found, folder.given)
        model.load_weights(found)
    if opening.lora is not None:
        return model
    for projection in stack.projections:
        projection.merge()
    return LeanModel(config, stack, head_VH, None)


def _rounded(batch: FlatBatch, is_useful: bool) -> FlatBatch:
    """With spare rows at the end, so that the products have few different sizes."""
    spare = -len(batch) % (2 * SHAPE_STEP)
    if not is_useful or not spare:
        return batch
    zeros = batch.ids_T.new_zeros(spare)
    return replace(
        batch,
        ids_T=torch.cat([batch.ids_T, zeros]),
        positions_T=torch.cat([batch.positions_T, zeros]),
    )

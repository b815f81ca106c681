"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 with a forward pass of our own, on a CPU in fp32.

The weights come and go under transformers' names, bit for bit; adapters under PEFT's.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
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
from tunesmith.nn.attention import Looking
from tunesmith.nn.batch import FlatBatch
from tunesmith.nn.cross_entropy import (
    linear_cross_entropy_sum,
    linear_grades,
    linear_log_probs,
)
from tunesmith.nn.folder import ModelFolder
from tunesmith.nn.hosted import context_length
from tunesmith.nn.kernels import Kernels, compiled
from tunesmith.nn.matmul import SHAPE_STEP, is_onednn, product
from tunesmith.nn.opening import Opening, load_config, new_model, pad_of
from tunesmith.nn.projection import Projection
from tunesmith.nn.weights import read_file, read_tensors, write_tensors
from tunesmith.spec.train import Lora

HEAD, SCORE = "lm_head.weight", "score.weight"


class Stack(Protocol):
    embedding_name: str
    plain: dict[str, nn.Parameter]
    """Weights that are no projection, under transformers' names."""
    should_checkpoint: bool
    kernels: Kernels

    @property
    def projections(self) -> list[Projection]: ...

    def hidden_rows(self, batch: FlatBatch, is_training: bool) -> Tensor: ...

    def next_rows(self, ids_B: Tensor, positions_B: Tensor, past: Looking) -> Tensor: ...

    def stop_dropout(self) -> None: ...


class LeanDecoder:
    """All but what comes out. See `Model`."""

    is_lean = True
    can_share_prompts = True

    def __init__(
        self, config: Any, stack: Stack, head: Mapping[str, nn.Parameter], plan: AdapterPlan | None
    ) -> None:
        """`plan` None trains every weight; else the stack's projections have its adapters, and of
        all other weights only a head that scores is trained."""
        self._config = config
        self._stack = stack
        self._plan = plan
        self._is_training = True
        self._plain = {**stack.plain, **head}
        for name, one in self._plain.items():
            one.requires_grad_(plan is None or name == SCORE)
        self.context_length = context_length(config)
        self.vocabulary_size = int(self._plain[stack.embedding_name].shape[0])
        self._trainable = self._find_trainable()
        self._worn = [(one, one.worn) for one in stack.projections]
        self.parameters_total = sum(tensor.numel() for tensor in self._published().values()) + sum(
            one.numel() for name, one in self._trainable.items() if ".lora_" in name
        )

    @property
    def _is_scoring(self) -> bool:
        return SCORE in self._plain

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
            save_adapter(folder, self._plan, self._adapters(), is_scoring=self._is_scoring)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._name_architecture()
        self._config.dtype = torch.float32
        self._config.save_pretrained(str(folder))
        write_tensors(folder, self._published())
        generation = Path(str(self._config.name_or_path)) / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)

    def _name_architecture(self) -> None:
        language, scoring = _ARCHITECTURES[self._config.model_type]
        self._config.architectures = [scoring if self._is_scoring else language]
        if self._is_scoring:
            self._config.num_labels = 1
            self._config.pad_token_id = pad_of(self._config)

    def gather(self) -> None:
        """It is whole in each process."""

    def idle(self) -> None:
        """No process waits for another's pass."""

    def train(self) -> None:
        self._is_training = True

    def eval(self) -> None:
        self._is_training = False

    def _dressed(self) -> Stack:
        """The stack with this model's adapters: other models may share it."""
        for projection, worn in self._worn:
            projection.wear(worn)
        return self._stack

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


class LeanModel(LeanDecoder):
    """See `LanguageModel`."""

    def __init__(
        self, config: Any, stack: Stack, head: Mapping[str, nn.Parameter], plan: AdapterPlan | None
    ) -> None:
        super().__init__(config, stack, head, plan)
        self._head_VH = self._plain.get(HEAD, self._plain[stack.embedding_name])
        self.width = int(self._head_VH.shape[1])

    def loss_sum(self, batch: FlatBatch) -> Tensor:
        if not batch.labels:
            return self._head_VH.new_zeros(()).requires_grad_()
        batch = _rounded(batch, is_onednn(self._head_VH))
        hidden_RH = self._dressed().hidden_rows(batch, self._is_training)
        return linear_cross_entropy_sum(hidden_RH, self._head_VH, batch.targets_R)

    @torch.no_grad()
    def grades(self, batch: FlatBatch) -> Tensor:
        if not batch.labels:
            return self._head_VH.new_zeros(2, dtype=torch.float64)
        return linear_grades(self.states(batch), self._head_VH, batch.targets_R)

    def log_probs(self, batch: FlatBatch, temperature: float = 1.0) -> Tensor:
        return self.log_probs_and_states(batch, temperature)[0]

    def states(self, batch: FlatBatch) -> Tensor:
        batch = _rounded(batch, is_onednn(self._head_VH))
        return self._dressed().hidden_rows(batch, self._is_training)

    def log_probs_and_states(
        self, batch: FlatBatch, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        hidden_RH = self.states(batch)
        warm_RH = hidden_RH if temperature == 1 else hidden_RH / temperature
        return linear_log_probs(warm_RH, self._head_VH, batch.targets_R), hidden_RH

    can_look_back = True

    @torch.no_grad()
    def logits(self, batch: FlatBatch) -> Tensor:
        batch = _rounded(batch, is_onednn(self._head_VH))
        return product(self._dressed().hidden_rows(batch, is_training=False), self._head_VH)

    @torch.no_grad()
    def next_logits(self, ids_B: Tensor, positions_B: Tensor, past: Looking) -> Tensor:
        return product(self._dressed().next_rows(ids_B, positions_B, past), self._head_VH)


class LeanScorer(LeanDecoder):
    """See `ScoringModel`."""

    def scores(self, batch: FlatBatch) -> Tensor:
        score_1H = self._plain[SCORE]
        batch = _rounded(batch, is_onednn(score_1H))
        return F.linear(self._dressed().hidden_rows(batch, self._is_training), score_1H)[:, 0]


_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": ("MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
}
"""With a head for tokens, and with one that scores."""
_NO_PROJECTION = {"lm_head", "embed_tokens", "wte", "wpe"}
"""Targets that only PEFT can put an adapter on."""


def open_lean(folder: ModelFolder, opening: Opening) -> LeanModel | None:
    """None where the architecture, the device or the adapter asks for transformers itself.

    Raises JobFailure(USER_ERROR).
    """
    found = _open(folder, [opening], LeanModel, _token_head)
    return None if found is None else found[0]


def open_lean_beside(folder: ModelFolder, openings: Sequence[Opening]) -> list[LeanModel] | None:
    """One model an opening, over the same frozen weights; but for adapters and seeds the openings
    are alike. As `open_lean`."""
    return _open(folder, openings, LeanModel, _token_head)


def open_lean_scorer(folder: ModelFolder, opening: Opening) -> LeanScorer | None:
    """As `open_lean`."""

    def head(config: Any, state: Mapping[str, Tensor], _: str) -> dict[str, nn.Parameter] | None:
        return {SCORE: nn.Parameter(state.get(SCORE, new_score(config, opening.seed)).float())}

    found = _open(folder, [opening], LeanScorer, head)
    return None if found is None else found[0]


def open_lean_scorer_over(model: object, folder: ModelFolder) -> LeanScorer | None:
    """A reward model's adapter and head over the frozen weights of a model that trains adapters.

    None where it is no adapter, or one on other weights. Its scores are those it has by itself.
    """
    if not isinstance(model, LeanModel) or model._plan is None or folder.adapter is None:
        return None
    config, stack = model._config, model._stack
    if not _are_same_weights(Path(str(config.name_or_path)), folder.base):
        return None
    family = next(one for one in (llama, gpt2) if one.is_served(config))
    plan = plan_known(folder, family.module_names(config), is_scoring=True)
    if plan is None:
        return None
    head = {SCORE: nn.Parameter(new_score(config, 0))}

    def make(plan: AdapterPlan | None) -> LeanScorer:
        return LeanScorer(config, stack, head, plan)

    opening = Opening(lora=Lora(), has_dropout=False)
    return _with_adapters(make, stack, plan, folder, opening)


def _are_same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the very same files."""
    found = [{path.name: path for path in place.glob("*.safetensors")} for place in (one, other)]
    is_alike = found[0].keys() == found[1].keys() and bool(found[0])
    return is_alike and all(found[0][name].samefile(found[1][name]) for name in found[0])


Decoder = TypeVar("Decoder", bound=LeanDecoder)
FindHead = Callable[[Any, Mapping[str, Tensor], str], "dict[str, nn.Parameter] | None"]
"""From the config, the weights and the embedding's name among them; None where there is none."""


def _open(
    folder: ModelFolder, openings: Sequence[Opening], kind: type[Decoder], find_head: FindHead
) -> list[Decoder] | None:
    opening = openings[0]
    is_plain = opening.device == "cpu" and opening.precision == "fp32" and not opening.quantization
    if not is_plain or opening.is_sharded:
        return None
    config = load_config(folder)
    family = next((one for one in (llama, gpt2) if one.is_served(config)), None)
    if family is None:
        return None
    modules = family.module_names(config)
    is_scoring = issubclass(kind, LeanScorer)
    is_transposed = family is gpt2
    plans = [
        _plan(folder, one, modules, is_transposed=is_transposed, is_scoring=is_scoring)
        for one in openings
    ]
    if None in plans and (folder.adapter is not None or opening.lora is not None):
        return None
    built = _build(config, _state(config, folder, opening), find_head)
    if built is None:
        return None
    stack, head = built
    stack.should_checkpoint = opening.gradient_checkpointing
    if not opening.has_dropout:
        stack.stop_dropout()
    if opening.should_compile:
        stack.kernels = compiled()

    def make(plan: AdapterPlan | None) -> Decoder:
        return kind(config, stack, head, plan)

    return [
        make(None) if plan is None else _with_adapters(make, stack, plan, folder, one)
        for one, plan in zip(openings, plans, strict=True)
    ]


def _plan(
    folder: ModelFolder,
    opening: Opening,
    modules: list[str],
    *,
    is_transposed: bool,
    is_scoring: bool,
) -> AdapterPlan | None:
    if folder.adapter is not None:
        return plan_known(folder, modules, is_scoring=is_scoring)
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
    heads = {HEAD, SCORE}
    return {name if name in heads else prefix + name: tensor for name, tensor in state.items()}


def _build(
    config: Any, state: Mapping[str, Tensor], find_head: FindHead
) -> tuple[Stack, dict[str, nn.Parameter]] | None:
    """None where the tensors are not the ones that the config's architecture has."""
    kind = gpt2.Gpt2Stack if config.model_type == "gpt2" else llama.LlamaStack
    try:
        stack = kind(config, state)
        head = find_head(config, state, kind.embedding_name)
    except KeyError:
        return None
    return None if head is None else (stack, head)


def _token_head(
    config: Any, state: Mapping[str, Tensor], embedding_name: str
) -> dict[str, nn.Parameter] | None:
    """Empty where the embedding is the head."""
    if not config.tie_word_embeddings:
        return {HEAD: nn.Parameter(state[HEAD].float().clone())}
    embedding = state[embedding_name]
    return {} if torch.equal(state.get(HEAD, embedding), embedding) else None


def new_score(config: Any, seed: int) -> Tensor:
    """(1, H), as wide as transformers draws a new layer; the random state is left alone."""
    dice = torch.Generator().manual_seed(seed)
    width, spread = int(config.hidden_size), float(config.initializer_range)
    return torch.randn(1, width, generator=dice) * spread


def _with_adapters(
    make: Callable[[AdapterPlan | None], Decoder],
    stack: Stack,
    plan: AdapterPlan,
    folder: ModelFolder,
    opening: Opening,
) -> Decoder:
    shape = plan.shape if opening.has_dropout else replace(plan.shape, dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(opening.seed)
        for projection in stack.projections:
            projection.adapt(plan.modules, shape)
    model = make(plan)
    if folder.adapter is not None:
        _load_adapter(model, folder)
    if opening.lora is not None:
        return model
    for projection in stack.projections:
        projection.merge()
    return make(None)


def _load_adapter(model: LeanDecoder, folder: ModelFolder) -> None:
    """One that was made without a head that scores leaves the model's new one as it is."""
    assert folder.adapter is not None
    own, score = model.weights(), published_name(SCORE)
    found = read_file(folder.adapter / "adapter_model.safetensors")
    if score in own:
        found = {score: own[score], **found}
    check_fit(own, found, folder.given)
    model.load_weights(found)


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

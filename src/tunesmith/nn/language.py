"""A causal language model as training sees it, and how one is opened from a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

from tunesmith.nn.attention import Looking
from tunesmith.nn.batch import FlatBatch
from tunesmith.nn.folder import open_folder
from tunesmith.nn.lean import open_lean, open_lean_beside, open_lean_scorer, open_lean_scorer_over
from tunesmith.nn.memory import give_back_at_once, keep_freed_memory
from tunesmith.nn.opening import (
    Opening,
    check_opening,
    open_hosted,
    open_hosted_beside,
    open_hosted_scorer,
)
from tunesmith.spec.train import Lora


class Model(Protocol):
    """What a training loop needs, whatever the architecture and whatever it puts out."""

    context_length: int
    """Tokens."""
    vocabulary_size: int
    """Rows of the embedding: ids must be below it."""
    is_lean: bool
    """Whether the forward pass is our own."""
    parameters_total: int

    @property
    def can_share_prompts(self) -> bool:
        """Whether a batch may have `runs`: see `nn.forks`."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Always in the same order."""

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the tensors in training, under transformers' or PEFT's names.

        They share memory with the model: a later step changes them.
        """

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `weights`."""

    def save(self, folder: Path) -> None:
        """Write what plain transformers (or PEFT, for an adapter) loads."""

    def gather(self) -> None:
        """Before `save`, by all processes at the same time: where each holds a part of the model,
        the first then has it whole."""

    def idle(self) -> None:
        """Where each holds a part: forward, and backward where gradients are taken, over nothing,
        to keep step with others that have a pass more."""

    def train(self) -> None:
        """Dropout on."""

    def eval(self) -> None:
        """Dropout off."""


class LanguageModel(Model, Protocol):
    """One that predicts tokens."""

    def loss_sum(self, batch: FlatBatch) -> Tensor:
        """The sum, in fp32, of the label losses of the batch; differentiable."""

    def grades(self, batch: FlatBatch) -> Tensor:
        """Two numbers in float64: the sum of the labels' losses, and how many labels are the
        likeliest token of their place. Not differentiable."""

    def log_probs(self, batch: FlatBatch, temperature: float = 1.0) -> Tensor:
        """The log-probability, in fp32, of each label (R,); differentiable. R is above 0."""

    @property
    def width(self) -> int:
        """Of hidden states."""

    def states(self, batch: FlatBatch) -> Tensor:
        """What the head is given, (R, H); differentiable. Targets are not looked at."""

    def log_probs_and_states(
        self, batch: FlatBatch, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`log_probs` and `states` in one."""

    @property
    def can_look_back(self) -> bool:
        """Whether there is `next_logits`, and `logits` fills a batch's `kept`."""

    def logits(self, batch: FlatBatch) -> Tensor:
        """Of each of the batch's rows (R, V), in fp32 and without dropout; not differentiable.
        Targets are not looked at."""

    def next_logits(self, ids_B: Tensor, positions_B: Tensor, past: Looking) -> Tensor:
        """As `logits`, of tokens whose own past each layer's attention finds in `past`."""


class ScoringModel(Model, Protocol):
    """One that gives a number."""

    def scores(self, batch: FlatBatch) -> Tensor:
        """Of each of the batch's rows (R,), in fp32; differentiable. Targets are not looked at."""


def open_model(
    folder: str,
    *,
    lora: Lora | None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "cpu",
    compile: bool = False,
    seed: int = 42,
    gradient_checkpointing: bool = False,
    quantization: Literal["4bit", "8bit"] | None = None,
    from_scratch: bool = False,
    has_dropout: bool = True,
) -> LanguageModel:
    """Open a model folder, or an adapter's, for training; it comes back with dropout on.

    An adapter's folder with `lora` given goes on training that adapter, whose own rank and targets
    hold; with `lora` None it is merged into its base and every weight is trained. `from_scratch`
    takes the config only, and draws weights from `seed`. Without `has_dropout` there is none,
    whatever the config and the adapter say. `compile` concerns our own forward pass
    alone: seconds of CPU at the start, for a few percent of each step.
    Raises JobFailure(USER_ERROR).
    """
    opening = Opening(
        lora=lora,
        precision=precision,
        device=device,
        should_compile=compile,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization,
        from_scratch=from_scratch,
        has_dropout=has_dropout,
    )
    return open_with(folder, opening)


def open_with(folder: str, opening: Opening) -> LanguageModel:
    """`open_model`, with what it is told as one."""
    found = open_folder(folder, needs_weights=not opening.from_scratch)
    check_opening(found, opening)
    _arrange_memory(opening)
    return open_lean(found, opening) or open_hosted(found, opening)


def _arrange_memory(opening: Opening) -> None:
    if opening.device != "cpu":
        return
    if opening.is_sharded:
        give_back_at_once()
    else:
        keep_freed_memory()


def open_beside(folder: str, openings: Sequence[Opening]) -> list[LanguageModel]:
    """Several models over one copy of frozen weights, each with adapters of its own.

    But for `lora` and `seed` the openings are alike, and `lora` is given in each. Each model
    computes what it would if it were opened by itself. Raises JobFailure(USER_ERROR).
    """
    found = open_folder(folder)
    for opening in openings:
        check_opening(found, opening)
    if openings[0].device == "cpu":
        keep_freed_memory()
    lean = open_lean_beside(found, openings)
    return list(lean if lean is not None else open_hosted_beside(found, openings))


def open_scorer(folder: str, opening: Opening) -> ScoringModel:
    """Open a folder as `open_model` does, with a head that gives one number in place of its own.

    The head is the folder's where that is a reward model's, else a new one drawn from the seed; it
    is trained whole also where the rest has adapters. Raises JobFailure(USER_ERROR).
    """
    found = open_folder(folder)
    check_opening(found, opening, is_scoring=True)
    _arrange_memory(opening)
    return open_lean_scorer(found, opening) or open_hosted_scorer(found, opening)


def open_scorer_over(model: LanguageModel, folder: str) -> ScoringModel | None:
    """A reward model's adapter and head over the frozen weights of a model that trains adapters.

    None where that cannot be: it is then opened by itself. Raises JobFailure(USER_ERROR).
    """
    return open_lean_scorer_over(model, open_folder(folder))

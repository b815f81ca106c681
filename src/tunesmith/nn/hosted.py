"""Any causal language model of transformers, trained as it is, with our attention and our loss.

Two things about an architecture are found out when it is opened, by running a few tokens through:
whether samples can be joined to one row (else they are padded, side by side), and whether logits
are nothing but a product with the head's weight (else its own forward makes them).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunesmith.nn.attention import Looking
from tunesmith.nn.batch import FlatBatch, flatten
from tunesmith.nn.cross_entropy import (
    linear_cross_entropy_sum,
    linear_grades,
    linear_log_probs,
)
from tunesmith.nn.registered import ATTENTION, AttentionNotServed


@dataclass(frozen=True)
class Ways:
    """How an architecture can be run."""

    is_flat: bool
    """Samples joined to one row; else padded."""
    has_plain_head: bool
    """What comes out is hidden @ weight.T + bias."""
    attention: str
    """The implementation for padded rows."""


class HostedDecoder:
    """A transformers model, with or without PEFT around it, whatever it puts out. See `Model`."""

    is_lean = False

    def __init__(
        self,
        model: Any,
        ways: Ways,
        *,
        autocast_dtype: torch.dtype | None = None,
        adapter: Any = None,
        name: str = "default",
    ) -> None:
        """`name` is that of its adapter, where `adapter` has several."""
        self._model = model
        self._peft = adapter
        self._name = name
        self._wear()
        self._ways = ways
        self._autocast_dtype = autocast_dtype
        self.context_length = context_length(model.config)
        self.vocabulary_size = int(model.get_input_embeddings().weight.shape[0])
        self.parameters_total = sum(one.numel() for one in self._outer.parameters())
        self._trainable = {
            name: one for name, one in self._outer.named_parameters() if one.requires_grad
        }

    @property
    def _outer(self) -> Any:
        return self._model if self._peft is None else self._peft

    @property
    def can_share_prompts(self) -> bool:
        return self._ways.is_flat

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self._trainable)

    def weights(self) -> dict[str, Tensor]:
        if self._peft is not None:
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(self._peft, adapter_name=self._name)
            return cast("dict[str, Tensor]", state)
        return without_ties(self._model)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self._peft is not None:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self._peft, dict(weights), adapter_name=self._name)
            return
        expected = without_ties(self._model).keys()
        assert expected == weights.keys(), f"other weights: {sorted(expected ^ weights.keys())[:4]}"
        self._model.load_state_dict(dict(weights), strict=False)

    def save(self, folder: Path) -> None:
        with plain_attention(self._model, self._ways.attention):
            if self._peft is None:
                self._model.save_pretrained(str(folder))
            else:
                self._save_adapter(folder)

    def _save_adapter(self, folder: Path) -> None:
        """PEFT puts those with another name than `default` into a folder of that name."""
        self._peft.save_pretrained(str(folder), selected_adapters=[self._name])
        inner = folder / self._name
        if inner.is_dir():
            for path in inner.iterdir():
                path.rename(folder / path.name)
            inner.rmdir()

    def _wear(self) -> None:
        """Compute with its own adapter: other models may share the weights."""
        if self._peft is not None and self._peft.active_adapter != self._name:
            self._peft.set_adapter(self._name)

    def gather(self) -> None:
        """It is whole in each process."""

    def idle(self) -> None:
        """No process waits for another's pass."""

    def train(self) -> None:
        self._outer.train()

    def eval(self) -> None:
        self._outer.eval()

    def _precision(self) -> AbstractContextManager[Any]:
        self._wear()
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._model.device.type, self._autocast_dtype)

    def _hidden_rows(self, batch: FlatBatch) -> Tensor:
        return run_rows(self._model.base_model, batch, self._ways.is_flat)


class HostedModel(HostedDecoder):
    """See `LanguageModel`."""

    def loss_sum(self, batch: FlatBatch) -> Tensor:
        with self._precision():
            if self._ways.has_plain_head:
                hidden_RH = self._hidden_rows(batch)
                return self._with_head(linear_cross_entropy_sum, hidden_RH, batch.targets_R)
            logits_RV = self._logit_rows(batch)
        return F.cross_entropy(logits_RV.float(), batch.targets_R, reduction="sum")

    @torch.no_grad()
    def grades(self, batch: FlatBatch) -> Tensor:
        with self._precision():
            if self._ways.has_plain_head:
                return self._with_head(linear_grades, self._hidden_rows(batch), batch.targets_R)
            logits_RV = self._logit_rows(batch).float()
        loss = F.cross_entropy(logits_RV, batch.targets_R, reduction="sum")
        hits = (logits_RV.argmax(1) == batch.targets_R).sum()
        return torch.stack((loss.double(), hits.double()))

    def log_probs(self, batch: FlatBatch, temperature: float = 1.0) -> Tensor:
        if self._ways.has_plain_head:
            return self.log_probs_and_states(batch, temperature)[0]
        with self._precision():
            logits_RV = self._logit_rows(batch).float() / temperature
        return -F.cross_entropy(logits_RV, batch.targets_R, reduction="none")

    def states(self, batch: FlatBatch) -> Tensor:
        with self._precision():
            return self._hidden_rows(batch)

    def log_probs_and_states(
        self, batch: FlatBatch, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Where the head is not plain, all layers run twice."""
        hidden_RH = self.states(batch)
        if not self._ways.has_plain_head:
            return self.log_probs(batch, temperature), hidden_RH
        with self._precision():
            found = self._with_head(linear_log_probs, hidden_RH, batch.targets_R, temperature)
        return found, hidden_RH

    @property
    def width(self) -> int:
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def can_look_back(self) -> bool:
        return self._ways.is_flat

    @torch.no_grad()
    def logits(self, batch: FlatBatch) -> Tensor:
        with self._still(), self._precision():
            return self._by_head(run_rows(self._logit_maker, batch, self._ways.is_flat))

    @torch.no_grad()
    def next_logits(self, ids_B: Tensor, positions_B: Tensor, past: Looking) -> Tensor:
        with self._still(), self._precision():
            out = self._logit_maker(
                input_ids=ids_B[None],
                position_ids=positions_B[None],
                flat_segments=past,
                use_cache=False,
            )
            return self._by_head(out[0][0])

    @property
    def _logit_maker(self) -> Any:
        return self._model.base_model if self._ways.has_plain_head else self._model

    def _by_head(self, out_RN: Tensor) -> Tensor:
        """Logits in fp32 from what `_logit_maker` made."""
        if not self._ways.has_plain_head:
            return out_RN.float()
        head = self._model.get_output_embeddings()
        dtype = self._autocast_dtype or head.weight.dtype
        with torch.autocast(out_RN.device.type, enabled=False):
            logits_RV = F.linear(out_RN.to(dtype), head.weight.to(dtype)).float()
            return logits_RV if head.bias is None else logits_RV + head.bias

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Without dropout."""
        was_training = self._outer.training
        self._outer.eval()
        try:
            yield
        finally:
            self._outer.train(was_training)

    def _with_head(
        self,
        function: Callable[..., Tensor],
        hidden_RH: Tensor,
        targets_R: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """A function of hidden states, the head's weight, targets and the head's bias."""
        head = self._model.get_output_embeddings()
        dtype = self._autocast_dtype or head.weight.dtype
        bias_V = head.bias
        if temperature != 1:
            hidden_RH = hidden_RH / temperature
            bias_V = None if bias_V is None else bias_V / temperature
        with torch.autocast(hidden_RH.device.type, enabled=False):
            return function(hidden_RH.to(dtype), head.weight.to(dtype), targets_R, bias_V)

    def _logit_rows(self, batch: FlatBatch) -> Tensor:
        return run_rows(self._model, batch, self._ways.is_flat)


class HostedScorer(HostedDecoder):
    """See `ScoringModel`."""

    def scores(self, batch: FlatBatch) -> Tensor:
        with self._precision():
            score_R1 = self._model.score(self._hidden_rows(batch))
        return cast(Tensor, score_R1.float()[:, 0])


def run_rows(module: Any, batch: FlatBatch, is_flat: bool) -> Tensor:
    """The backbone's hidden states, or the whole model's logits, on the batch's label rows."""
    if is_flat:
        out = module(
            input_ids=batch.ids_T[None],
            position_ids=batch.positions_T[None],
            flat_segments=batch.segments,
            use_cache=False,
        )
        return cast(Tensor, out[0][0, batch.rows_R])
    pieces = [batch.ids_T[a:b] for a, b in pairwise(batch.bounds)]
    ids_BL = pad_sequence(pieces, batch_first=True)
    lengths_B = torch.tensor([len(piece) for piece in pieces], device=ids_BL.device)
    is_token_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
    out = module(input_ids=ids_BL, attention_mask=is_token_BL.long(), use_cache=False)
    return cast(Tensor, out[0][is_token_BL][batch.rows_R])


def find_ways(model: Any, part: Any = None) -> Ways:
    """Run two short segments apart and joined, and see what comes out the same. Sets `model` up.

    `part`, where given, is what of it makes the hidden states, looked at in place of the logits.
    """
    module = model if part is None else part
    model.eval()
    attention = model.config._attn_implementation
    batch = _probe(int(model.get_input_embeddings().weight.shape[0]), model.device)
    with torch.no_grad():
        apart_RV = torch.cat([run_rows(module, one, is_flat=False) for one in batch[1:]])
        is_flat = _is_same_when_joined(model, module, batch[0], apart_RV)
        if not is_flat:
            model.set_attn_implementation(attention)
        has_head = part is not None or _has_plain_head(model, batch[0], apart_RV, is_flat)
        return Ways(is_flat, has_head, attention)


def _is_same_when_joined(model: Any, module: Any, batch: FlatBatch, apart_RV: Tensor) -> bool:
    if not type(model)._supports_attention_backend and not model._can_set_attn_implementation():
        return False
    try:
        model.set_attn_implementation(ATTENTION)
        joined_RV = run_rows(module, batch, is_flat=True)
    except (AttentionNotServed, TypeError, ValueError, RuntimeError):
        return False
    return is_close(joined_RV, apart_RV)


def _has_plain_head(model: Any, batch: FlatBatch, logits_RV: Tensor, is_flat: bool) -> bool:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or model.base_model is model:
        return False
    hidden_RH = run_rows(model.base_model, batch, is_flat)
    return is_close(F.linear(hidden_RH.to(head.weight.dtype), head.weight, head.bias), logits_RV)


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Within rounding of each other, measured at the largest entry."""
    if ours.shape != theirs.shape:
        return False
    allowed = 1e-4 if theirs.dtype == torch.float32 else 3e-2
    difference = (ours.float() - theirs.float()).abs().max()
    return bool(difference <= allowed * theirs.float().abs().max())


def _probe(vocabulary: int, device: torch.device) -> tuple[FlatBatch, ...]:
    """Two segments joined, and each by itself."""
    ids = [(7 + 31 * place) % vocabulary for place in range(14)]
    pieces = [(part, [True] * len(part)) for part in (ids[:5], ids[5:])]
    return tuple(flatten(part, device) for part in (pieces, pieces[:1], pieces[1:]))


def without_ties(model: Any) -> dict[str, Tensor]:
    """The state dict, with a tensor that is there under two names kept under the first."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = tensor
    return state


@contextmanager
def plain_attention(model: Any, name: str) -> Iterator[None]:
    """So that a saved config names no attention of ours."""
    ours = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def context_length(config: Any) -> int:
    """Tokens that the architecture has positions for; very many where it sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 1 << 20

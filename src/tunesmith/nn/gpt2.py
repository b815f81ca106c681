"""GPT-2's decoder (Radford et al. 2019): layer norm, learned positions, a plain inner layer.

T tokens, H hidden size, D head size, K rows kept in the last layer, R label rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.nn.attention import AttentionRule, Looking, Segments, attend
from tunesmith.nn.batch import FlatBatch
from tunesmith.nn.kernels import EAGER
from tunesmith.nn.matmul import SHAPE_STEP
from tunesmith.nn.projection import Part, Projection
from tunesmith.nn.rows import LastRows, last_rows

MODEL_TYPES = ("gpt2",)
APPROXIMATION = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
_LAYER = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Norm:
    weight_H: nn.Parameter
    bias_H: nn.Parameter
    epsilon: float

    def __call__(self, x_TH: Tensor) -> Tensor:
        return F.layer_norm(x_TH, self.weight_H.shape, self.weight_H, self.bias_H, self.epsilon)


@dataclass(frozen=True)
class Layer:
    norm: Norm
    qkv: Projection
    out: Projection
    inner_norm: Norm
    up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (self.qkv, self.out, self.up, self.down)


def is_served(config: Any) -> bool:
    """Whether this file computes what transformers would for this config."""
    return bool(
        config.model_type in MODEL_TYPES
        and config.activation_function in APPROXIMATION
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.add_cross_attention
    )


def module_names(config: Any) -> list[str]:
    """Of every linear layer that an adapter can be put on."""
    return [f"transformer.h.{layer}.{name}" for layer in range(config.n_layer) for name in _LAYER]


class Gpt2Stack:
    """From token ids to the hidden states of the label rows."""

    embedding_name = "transformer.wte.weight"

    def __init__(self, config: Any, state: Mapping[str, Tensor]) -> None:
        """`state` under transformers' names. Raises KeyError where one is missing."""
        self._heads = config.n_head
        self._epsilon = config.layer_norm_epsilon
        self._approximation = APPROXIMATION[config.activation_function]
        self._rates = (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop)
        self.plain: dict[str, nn.Parameter] = {}
        self._embedding_VH = self._plain(state, self.embedding_name)
        self._positions_PH = self._plain(state, "transformer.wpe.weight")
        self.layers = [self._layer(state, number) for number in range(config.n_layer)]
        self._norm = self._norm_of(state, "transformer.ln_f")
        self.should_checkpoint = False
        self.kernels = EAGER

    @property
    def projections(self) -> list[Projection]:
        return [one for layer in self.layers for one in layer.projections]

    def stop_dropout(self) -> None:
        self._rates = (0.0, 0.0, 0.0)

    def hidden_rows(self, batch: FlatBatch, is_training: bool) -> Tensor:
        """Of a batch whose `bounds` may end before its last rows: those are spare."""
        x_TH = F.embedding(batch.ids_T, self._embedding_VH)
        x_TH = x_TH + F.embedding(batch.positions_T, self._positions_PH)
        x_TH = F.dropout(x_TH, self._rates[0], is_training)
        segments = batch.segments
        for layer in self.layers[:-1]:
            if self.should_checkpoint and is_training:
                x_TH = checkpoint(
                    self._forward, layer, x_TH, segments, None, is_training, use_reentrant=False
                )
            else:
                x_TH = self._forward(layer, x_TH, segments, None, is_training)
        rows = last_rows(batch, SHAPE_STEP)
        x_KH = self._forward(self.layers[-1], x_TH, segments, rows, is_training)
        return self._norm(x_KH.index_select(0, rows.labels_R))

    def next_rows(self, ids_B: Tensor, positions_B: Tensor, past: Looking) -> Tensor:
        """The hidden states (B, H) of tokens that look at `past`."""
        x_BH = F.embedding(ids_B, self._embedding_VH)
        x_BH = x_BH + F.embedding(positions_B, self._positions_PH)
        for layer in self.layers:
            x_BH = self._forward(layer, x_BH, past, None, False)
        return self._norm(x_BH)

    def _forward(
        self,
        layer: Layer,
        x_TH: Tensor,
        segments: Segments | Looking,
        rows: LastRows | None,
        is_training: bool,
    ) -> Tensor:
        """With `rows`, only the rows kept come out."""
        qkv_T3H = layer.qkv(layer.norm(x_TH), is_training=is_training)
        q_HTD, k_HTD, v_HTD = (
            part.view(part.shape[0], self._heads, -1).transpose(0, 1)
            for part in qkv_T3H.chunk(3, 1)
        )
        if rows is not None and isinstance(segments, Segments):
            x_TH, q_HTD = x_TH.index_select(0, rows.kept_K), q_HTD.index_select(1, rows.kept_K)
            segments = replace(segments, query_bounds=rows.bounds)
        dropout = self._rates[2] if is_training else 0.0
        rule = AttentionRule(q_HTD.shape[-1] ** -0.5, dropout=dropout)
        mixed_THD = attend(q_HTD, k_HTD, v_HTD, segments, rule)
        x_TH = self._add(layer.out, mixed_THD.flatten(1), x_TH, is_training)
        inner_TI = layer.up(layer.inner_norm(x_TH), is_training=is_training)
        inner_TI = F.gelu(inner_TI, approximate=self._approximation)
        return self._add(layer.down, inner_TI, x_TH, is_training)

    def _add(self, layer: Projection, x_TN: Tensor, onto_TH: Tensor, is_training: bool) -> Tensor:
        """The layer's output, thinned, onto the residual stream."""
        if not (is_training and self._rates[1]):
            return layer(x_TN, onto_TH, is_training=is_training)
        return onto_TH + F.dropout(layer(x_TN, is_training=is_training), self._rates[1])

    def _layer(self, state: Mapping[str, Tensor], number: int) -> Layer:
        name = f"transformer.h.{number}"
        qkv, out, up, down = (
            Projection(
                (Part(f"{name}.{part}", state[f"{name}.{part}.weight"].shape[1]),),
                state,
                is_transposed=True,
            )
            for part in _LAYER
        )
        norm = self._norm_of(state, f"{name}.ln_1")
        return Layer(norm, qkv, out, self._norm_of(state, f"{name}.ln_2"), up, down)

    def _norm_of(self, state: Mapping[str, Tensor], name: str) -> Norm:
        weight, bias = (self._plain(state, f"{name}.{part}") for part in ("weight", "bias"))
        return Norm(weight, bias, self._epsilon)

    def _plain(self, state: Mapping[str, Tensor], name: str) -> nn.Parameter:
        self.plain[name] = nn.Parameter(state[name].float().clone())
        return self.plain[name]

"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share: RMS norm, rotary positions, gated inner.

T tokens, H hidden size, D head size, K rows kept in the last layer, R label rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.nn.attention import AttentionRule, Looking, Segments, attend
from tunesmith.nn.batch import FlatBatch
from tunesmith.nn.kernels import EAGER
from tunesmith.nn.layers import rms_norm, split_heads, swiglu
from tunesmith.nn.matmul import SHAPE_STEP
from tunesmith.nn.projection import Part, Projection
from tunesmith.nn.rows import LastRows, last_rows

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_STEADY_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary tables that hang on the position alone, not on how long the longest sample is."""


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    windows: tuple[int | None, ...]
    """Of each layer."""


@dataclass(frozen=True)
class Layer:
    norm_H: nn.Parameter
    qkv: Projection
    out: Projection
    inner_norm_H: nn.Parameter
    gate_up: Projection
    down: Projection
    head_norms_D: tuple[nn.Parameter, nn.Parameter] | None
    """Qwen3's, of queries and keys."""
    rule: AttentionRule

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)


@dataclass(frozen=True)
class Turn:
    """The rotary tables at the rows' positions, (T, D / 2)."""

    cos_TD: Tensor
    sin_TD: Tensor


def is_served(config: Any) -> bool:
    """Whether this file computes what transformers would for this config."""
    if config.model_type not in MODEL_TYPES:
        return False
    rope = config.rope_parameters or {}
    return bool(
        config.hidden_act == "silu"
        and not getattr(config, "attention_dropout", 0)
        and rope.get("rope_type", "default") in _STEADY_ROPE
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and head_size(config) % 2 == 0
    )


def head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def shape_of(config: Any) -> Shape:
    layers = config.num_hidden_layers
    window = None if config.model_type == "llama" else getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or config.model_type in {"llama", "mistral"}:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    return Shape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        epsilon=config.rms_norm_eps,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


def module_names(config: Any) -> list[str]:
    """Of every linear layer that an adapter can be put on."""
    inner = [f"self_attn.{part}_proj" for part in "qkvo"]
    inner += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{layer}.{name}" for layer in layers for name in inner]


class LlamaStack:
    """From token ids to the hidden states of the label rows."""

    embedding_name = "model.embed_tokens.weight"

    def __init__(self, config: Any, state: Mapping[str, Tensor]) -> None:
        """`state` under transformers' names. Raises KeyError where one is missing."""
        self.shape = shape_of(config)
        self.plain: dict[str, nn.Parameter] = {}
        self._embedding_VH = self._plain(state, self.embedding_name)
        self.layers = [
            self._layer(state, number, window) for number, window in enumerate(self.shape.windows)
        ]
        self._norm_H = self._plain(state, "model.norm.weight")
        self._frequencies_D, self._rope_scale = rope(config)
        self._tables_PD = (torch.empty(0), torch.empty(0))
        self.should_checkpoint = False
        self.kernels = EAGER

    @property
    def projections(self) -> list[Projection]:
        return [one for layer in self.layers for one in layer.projections]

    def stop_dropout(self) -> None:
        """There is none."""

    def hidden_rows(self, batch: FlatBatch, is_training: bool) -> Tensor:
        """Of a batch whose `bounds` may end before its last rows: those are spare."""
        x_TH = F.embedding(batch.ids_T, self._embedding_VH)
        cos_PD, sin_PD = self._tables(batch.positions_T)
        turn = Turn(cos_PD[batch.positions_T], sin_PD[batch.positions_T])
        segments = batch.segments
        for layer in self.layers[:-1]:
            if self.should_checkpoint and is_training:
                x_TH = checkpoint(
                    self._forward, layer, x_TH, turn, segments, is_training, use_reentrant=False
                )
            else:
                x_TH = self._forward(layer, x_TH, turn, segments, is_training)
        rows = last_rows(batch, SHAPE_STEP)
        x_KH = self._forward_last(self.layers[-1], x_TH, turn, segments, rows, is_training)
        hidden_RH = x_KH.index_select(0, rows.labels_R)
        return rms_norm(hidden_RH, self._norm_H, self.shape.epsilon, self.kernels)

    def next_rows(self, ids_B: Tensor, positions_B: Tensor, past: Looking) -> Tensor:
        """The hidden states (B, H) of tokens that look at `past`."""
        x_BH = F.embedding(ids_B, self._embedding_VH)
        cos_PD, sin_PD = self._tables(positions_B)
        turn = Turn(cos_PD[positions_B], sin_PD[positions_B])
        for layer in self.layers:
            x_BH = self._forward(layer, x_BH, turn, past, False)
        return rms_norm(x_BH, self._norm_H, self.shape.epsilon, self.kernels)

    def _forward(
        self,
        layer: Layer,
        x_TH: Tensor,
        turn: Turn,
        segments: Segments | Looking,
        is_training: bool,
    ) -> Tensor:
        shape = self.shape
        normed_TH = rms_norm(x_TH, layer.norm_H, shape.epsilon, self.kernels)
        qkv_TN = layer.qkv(normed_TH, is_training=is_training)
        qkv_TN = self._norm_heads(layer, qkv_TN, shape.heads, shape.kv_heads)
        turned, v_KTD = split_heads(
            qkv_TN, turn.cos_TD, turn.sin_TD, (shape.heads + shape.kv_heads, shape.kv_heads)
        )
        q_HTD, k_KTD = turned.tensor_split([shape.heads])
        mixed_THD = attend(q_HTD, k_KTD, v_KTD, segments, layer.rule)
        x_TH = layer.out(mixed_THD.flatten(1), x_TH, is_training=is_training)
        return self._inner(layer, x_TH, is_training)

    def _forward_last(
        self,
        layer: Layer,
        x_TH: Tensor,
        turn: Turn,
        segments: Segments,
        rows: LastRows,
        is_training: bool,
    ) -> Tensor:
        shape, kept_K = self.shape, rows.kept_K
        normed_TH = rms_norm(x_TH, layer.norm_H, shape.epsilon, self.kernels)
        normed_KH = normed_TH.index_select(0, kept_K)
        q_KN = layer.qkv(normed_KH, parts=slice(0, 1), is_training=is_training)
        kv_TN = layer.qkv(normed_TH, parts=slice(1, 3), is_training=is_training)
        q_KN = self._norm_heads(layer, q_KN, shape.heads, 0)
        kv_TN = self._norm_heads(layer, kv_TN, 0, shape.kv_heads)
        cos_TD, sin_TD = turn.cos_TD, turn.sin_TD
        q_HKD, _ = split_heads(q_KN, cos_TD[kept_K], sin_TD[kept_K], (shape.heads, 0))
        k_KTD, v_KTD = split_heads(kv_TN, cos_TD, sin_TD, (shape.kv_heads, shape.kv_heads))
        segments = replace(segments, query_bounds=rows.bounds)
        mixed_KHD = attend(q_HKD, k_KTD, v_KTD, segments, layer.rule)
        x_KH = x_TH.index_select(0, kept_K)
        x_KH = layer.out(mixed_KHD.flatten(1), x_KH, is_training=is_training)
        return self._inner(layer, x_KH, is_training)

    def _inner(self, layer: Layer, x_TH: Tensor, is_training: bool) -> Tensor:
        normed_TH = rms_norm(x_TH, layer.inner_norm_H, self.shape.epsilon, self.kernels)
        inner_TI = swiglu(layer.gate_up(normed_TH, is_training=is_training), self.kernels)
        return layer.down(inner_TI, x_TH, is_training=is_training)

    def _norm_heads(self, layer: Layer, x_TN: Tensor, queries: int, keys: int) -> Tensor:
        """Qwen3: each head of the queries and of the keys has its own length set to one."""
        if layer.head_norms_D is None:
            return x_TN
        size = self.shape.head_size
        widths = [queries * size, keys * size]
        q_TN, k_TN, rest_TN = x_TN.tensor_split([widths[0], sum(widths)], 1)
        q_TN, k_TN = (
            rms_norm(part.reshape(-1, size), norm_D, self.shape.epsilon).view(part.shape)
            if part.numel()
            else part
            for part, norm_D in zip((q_TN, k_TN), layer.head_norms_D, strict=True)
        )
        return torch.cat([q_TN, k_TN, rest_TN], 1)

    def _tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position up to the highest one met."""
        needed = int(positions_T.max()) + 1
        if self._tables_PD[0].shape[0] < needed:
            size = 1 << (needed - 1).bit_length()
            angles_PD = torch.arange(size)[:, None].float() * self._frequencies_D
            scale = self._rope_scale
            self._tables_PD = (angles_PD.cos() * scale, angles_PD.sin() * scale)
        return self._tables_PD

    def _layer(self, state: Mapping[str, Tensor], number: int, window: int | None) -> Layer:
        name, shape = f"model.layers.{number}", self.shape
        hidden = state[f"{name}.self_attn.q_proj.weight"].shape[1]
        inner = state[f"{name}.mlp.gate_proj.weight"].shape[0]
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        has_head_norms = f"{attention}.q_norm.weight" in state
        norms = [f"{attention}.{part}_norm.weight" for part in "qk"] if has_head_norms else []
        qkv = tuple(
            Part(f"{attention}.{part}_proj", n) for part, n in zip("qkv", (q, kv, kv), strict=True)
        )
        gate_up = tuple(Part(f"{mlp}.{part}_proj", inner) for part in ("gate", "up"))
        head_norms = [self._plain(state, one) for one in norms]
        return Layer(
            norm_H=self._plain(state, f"{name}.input_layernorm.weight"),
            qkv=Projection(qkv, state),
            out=Projection((Part(f"{attention}.o_proj", hidden),), state),
            inner_norm_H=self._plain(state, f"{name}.post_attention_layernorm.weight"),
            gate_up=Projection(gate_up, state),
            down=Projection((Part(f"{mlp}.down_proj", hidden),), state),
            head_norms_D=(head_norms[0], head_norms[1]) if head_norms else None,
            rule=AttentionRule(shape.head_size**-0.5, window),
        )

    def _plain(self, state: Mapping[str, Tensor], name: str) -> nn.Parameter:
        self.plain[name] = nn.Parameter(state[name].float().clone())
        return self.plain[name]


def rope(config: Any) -> tuple[Tensor, float]:
    """Frequencies (D / 2) and the scale of cos and sin, as transformers works them out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        frequencies, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(scale)

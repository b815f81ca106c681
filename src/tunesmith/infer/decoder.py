"""The forward pass of Llama, Mistral, Qwen2, Qwen3 and GPT-2 as they are served: packed weights,
adapters over them, and whatever a row looks at.

T rows, H hidden size, D head size, N outputs, R rows that are wanted, V vocabulary entries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.infer.overlay import Dress, Overlaid
from tunesmith.nn import gpt2, llama
from tunesmith.nn.kernels import EAGER
from tunesmith.nn.packed import Packed, Precision, apply, beside, pack
from tunesmith.nn.projection import Part

Norm = Callable[[Tensor], Tensor]
HEAD = "lm_head.weight"


class Looks(Protocol):
    """See `Sight.attend`."""

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Turn:
    """The rotary tables at the rows' positions, (T, 1, D / 2)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_TKD: Tensor) -> Tensor:
        """A head's first half against its second (Su et al. 2021, arXiv:2104.09864)."""
        tokens, heads, size = x_TKD.shape
        x = x_TKD.view(tokens, heads, 2, size // 2)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.mul(x[:, :, 0], self.cos, out=out[:, :, 0]).addcmul_(x[:, :, 1], self.sin, value=-1)
        torch.mul(x[:, :, 1], self.cos, out=out[:, :, 1]).addcmul_(x[:, :, 0], self.sin)
        return out.flatten(2)


@dataclass(frozen=True)
class Block:
    norm: Norm
    qkv: Overlaid
    out: Overlaid
    inner_norm: Norm
    up: Overlaid
    """All that goes into the inner layer: gates and ups, where it is gated."""
    down: Overlaid
    head_norms: tuple[Norm, Norm] | None
    """Of queries and keys."""
    window: int | None

    @property
    def linears(self) -> tuple[Overlaid, ...]:
        return (self.qkv, self.out, self.up, self.down)


@dataclass(frozen=True)
class Decoder:
    embedding_VH: Tensor
    positions_PH: Tensor | None
    """Learned ones."""
    blocks: tuple[Block, ...]
    norm: Norm
    head: Packed
    inner: Norm
    """The inner layer's activation."""
    heads: int
    kv_heads: int
    head_size: int
    tables: "Tables | None"

    def hidden(self, ids_T: Tensor, positions_T: Tensor, looks: Looks, dress: Dress) -> Tensor:
        """(T, H), the last norm still to come."""
        x_TH = F.embedding(ids_T, self.embedding_VH).float()
        if self.positions_PH is not None:
            x_TH = x_TH + F.embedding(positions_T, self.positions_PH)
        turn = None if self.tables is None else self.tables.at(positions_T)
        for layer, block in enumerate(self.blocks):
            x_TH = self._mix(layer, block, x_TH, turn, looks, dress)
            inner_TI = self.inner(block.up(block.inner_norm(x_TH), dress))
            x_TH = block.down(inner_TI, dress, x_TH)
        return x_TH

    def logits(self, normed_RH: Tensor) -> Tensor:
        return apply(self.head, normed_RH)

    def _mix(
        self,
        layer: int,
        block: Block,
        x_TH: Tensor,
        turn: Turn | None,
        looks: Looks,
        dress: Dress,
    ) -> Tensor:
        qkv_TN = block.qkv(block.norm(x_TH), dress)
        heads, kv_heads = self.heads, self.kv_heads
        qkv_TKD = qkv_TN.view(-1, heads + 2 * kv_heads, self.head_size)
        qk_TKD, v_TKD = qkv_TKD[:, : heads + kv_heads], qkv_TKD[:, heads + kv_heads :]
        if block.head_norms is not None:
            q_norm, k_norm = block.head_norms
            normed = [q_norm(qk_TKD[:, :heads]), k_norm(qk_TKD[:, heads:])]
            qk_TKD = torch.cat(normed, 1)
        if turn is not None:
            qk_TKD = turn(qk_TKD)
        qkv = (qk_TKD[:, :heads], qk_TKD[:, heads:], v_TKD)
        mixed_THD = looks.attend(layer, qkv, self.head_size**-0.5, block.window)
        return block.out(mixed_THD.float().flatten(1), dress, x_TH)


class Tables:
    """Cosines and sines of every position up to the highest one met."""

    def __init__(self, frequencies_D: Tensor, scale: float) -> None:
        self._frequencies_D, self._scale = frequencies_D, scale
        self._cos, self._sin = torch.empty(0), torch.empty(0)

    def at(self, positions_T: Tensor) -> Turn:
        needed = int(positions_T.max()) + 1
        if self._cos.shape[0] < needed:
            size = 1 << (needed - 1).bit_length()
            angles_PD = torch.arange(size)[:, None].float() * self._frequencies_D
            self._cos, self._sin = angles_PD.cos() * self._scale, angles_PD.sin() * self._scale
        return Turn(self._cos[positions_T][:, None], self._sin[positions_T][:, None])


class RmsNorm:
    def __init__(self, weight_H: Tensor, epsilon: float) -> None:
        self._weight_H, self._epsilon = weight_H.float(), epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return EAGER.rms_norm(x, self._weight_H, self._epsilon)[0]


class LayerNorm:
    def __init__(self, weight_H: Tensor, bias_H: Tensor, epsilon: float) -> None:
        self._weight_H, self._bias_H, self._epsilon = weight_H.float(), bias_H.float(), epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight_H.shape, self._weight_H, self._bias_H, self._epsilon)


def module_names(config: Any) -> list[str] | None:
    """Of every linear layer that an adapter can be laid over; None where another architecture has
    to be served by transformers."""
    family = next((one for one in (llama, gpt2) if one.is_served(config)), None)
    return None if family is None else family.module_names(config)


def build(config: Any, state: Mapping[str, Tensor], precision: Precision) -> Decoder:
    """`state` under transformers' names, read a tensor at a time. Raises KeyError where the tensors
    are not those of the architecture."""
    maker = _Gpt2 if config.model_type in gpt2.MODEL_TYPES else _Llama
    return maker(config, state, precision).decoder()


class _Maker:
    is_transposed = False

    def __init__(self, config: Any, state: Mapping[str, Tensor], precision: Precision) -> None:
        self._config, self._state, self._precision = config, state, precision

    def _linear(self, *modules: str) -> Overlaid:
        """Of modules that share their input, joined."""
        weights = [self._state[f"{module}.weight"] for module in modules]
        if self.is_transposed:
            weights = [weight.t() for weight in weights]
        names = [f"{module}.bias" for module in modules if f"{module}.bias" in self._state]
        if len(names) not in {0, len(modules)}:
            raise KeyError(names[0])
        bias_N = torch.cat([self._state[name] for name in names]) if names else None
        parts = [Part(name, len(each)) for name, each in zip(modules, weights, strict=True)]
        joined = torch.cat(weights) if len(weights) > 1 else weights[0]
        packed = pack(joined, bias_N, self._precision)
        return Overlaid(packed, tuple(parts), beside(self._precision))

    def _head(self, embedding_VH: Tensor) -> Packed:
        weight_VH = embedding_VH if self._config.tie_word_embeddings else self._state[HEAD]
        return pack(weight_VH, None, self._precision)


class _Llama(_Maker):
    def decoder(self) -> Decoder:
        shape = llama.shape_of(self._config)
        embedding_VH = self._state["model.embed_tokens.weight"]
        return Decoder(
            embedding_VH=embedding_VH,
            positions_PH=None,
            blocks=tuple(self._block(at, window) for at, window in enumerate(shape.windows)),
            norm=self._norm("model.norm"),
            head=self._head(embedding_VH),
            inner=EAGER.swiglu,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            tables=Tables(*llama.rope(self._config)),
        )

    def _block(self, number: int, window: int | None) -> Block:
        name = f"model.layers.{number}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        head_norms = None
        if f"{attention}.q_norm.weight" in self._state:
            head_norms = (self._norm(f"{attention}.q_norm"), self._norm(f"{attention}.k_norm"))
        return Block(
            norm=self._norm(f"{name}.input_layernorm"),
            qkv=self._linear(*(f"{attention}.{part}_proj" for part in "qkv")),
            out=self._linear(f"{attention}.o_proj"),
            inner_norm=self._norm(f"{name}.post_attention_layernorm"),
            up=self._linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=self._linear(f"{mlp}.down_proj"),
            head_norms=head_norms,
            window=window,
        )

    def _norm(self, name: str) -> Norm:
        return RmsNorm(self._state[f"{name}.weight"], self._config.rms_norm_eps)


class _Gpt2(_Maker):
    is_transposed = True

    def decoder(self) -> Decoder:
        config = self._config
        embedding_VH = self._state["transformer.wte.weight"]
        approximation = gpt2.APPROXIMATION[config.activation_function]
        return Decoder(
            embedding_VH=embedding_VH,
            positions_PH=self._state["transformer.wpe.weight"].float(),
            blocks=tuple(self._block(number) for number in range(config.n_layer)),
            norm=self._norm("transformer.ln_f"),
            head=self._head(embedding_VH),
            inner=lambda x: F.gelu(x, approximate=approximation),
            heads=config.n_head,
            kv_heads=config.n_head,
            head_size=config.n_embd // config.n_head,
            tables=None,
        )

    def _block(self, number: int) -> Block:
        name = f"transformer.h.{number}"
        return Block(
            norm=self._norm(f"{name}.ln_1"),
            qkv=self._linear(f"{name}.attn.c_attn"),
            out=self._linear(f"{name}.attn.c_proj"),
            inner_norm=self._norm(f"{name}.ln_2"),
            up=self._linear(f"{name}.mlp.c_fc"),
            down=self._linear(f"{name}.mlp.c_proj"),
            head_norms=None,
            window=None,
        )

    def _norm(self, name: str) -> Norm:
        weight, bias = (self._state[f"{name}.{part}"] for part in ("weight", "bias"))
        return LayerNorm(weight, bias, self._config.layer_norm_epsilon)

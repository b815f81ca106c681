"""Linear layers of a published model, joined where they share their input, with their adapters.

T tokens, H inputs, N outputs of all parts together, R the rank of all adapters together.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.nn.layers import adapted_linear, linear


@dataclass(frozen=True)
class Part:
    """One linear layer of the published model."""

    module: str
    """Its name there: model.layers.0.self_attn.q_proj."""
    outputs: int


@dataclass(frozen=True)
class AdapterShape:
    """What all adapters of a job have in common (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int
    scale: float
    dropout: float
    has_magnitudes: bool = False
    """DoRA (Liu et al. 2024, arXiv:2402.09353): the length of each output's weights is trained by
    itself, and the low-rank product turns their direction only."""


@dataclass(frozen=True)
class Adapter:
    down_RH: nn.Parameter
    up_NR: nn.Parameter
    magnitude_N: nn.Parameter | None = None


@dataclass(frozen=True)
class Worn:
    """The adapters of one projection, by the places of their parts."""

    adapters: dict[int, Adapter]
    shape: AdapterShape


class Projection:
    """x @ weight.T + bias over the outputs of all parts, one after the other."""

    def __init__(
        self, parts: tuple[Part, ...], state: Mapping[str, Tensor], *, is_transposed: bool = False
    ) -> None:
        """`is_transposed`: the published weight is (inputs, outputs), as GPT-2's are."""
        self.parts = parts
        self._is_transposed = is_transposed
        weights = [state[f"{part.module}.weight"] for part in parts]
        weights = [weight.t() for weight in weights] if is_transposed else weights
        self.weight_NH = nn.Parameter(
            torch.cat([weight.float() for weight in weights]).contiguous()
        )
        biases = [state[f"{part.module}.bias"] for part in parts if f"{part.module}.bias" in state]
        assert len(biases) in {0, len(parts)}, f"{parts[0].module}: a bias on some parts only"
        self.bias_N = nn.Parameter(torch.cat(biases).float()) if biases else None
        self.adapters: dict[int, Adapter] = {}
        self._shape = AdapterShape(1, 1.0, 0.0)
        self._squared: dict[int, Tensor] = {}

    def __call__(
        self,
        x_TH: Tensor,
        plus_TN: Tensor | None = None,
        *,
        parts: slice = slice(None),
        is_training: bool = False,
    ) -> Tensor:
        """Of all parts, or of some that follow one another; `plus` is added to the outcome."""
        weight_NH, bias_N = self._cut(parts)
        adapters = self._adapters(parts)
        if adapters is None:
            return linear(x_TH, weight_NH, bias_N, plus_TN)
        down_RH, up_NR = adapters
        thinned_TH = None
        if is_training and self._shape.dropout:
            thinned_TH = F.dropout(x_TH, self._shape.dropout)
        if self._shape.has_magnitudes:
            ratio_N = self._ratios(parts)
            return _decomposed(
                x_TH, thinned_TH, (weight_NH, bias_N, down_RH, up_NR), ratio_N, plus_TN
            )
        if thinned_TH is None:
            return adapted_linear(x_TH, weight_NH, bias_N, down_RH, up_NR, plus_TN)
        frozen_TN = linear(x_TH, weight_NH, bias_N, plus_TN)
        return linear(linear(thinned_TH, down_RH, None, None), up_NR, None, frozen_TN)

    def adapt(self, modules: frozenset[str], shape: AdapterShape) -> None:
        """Freeze, and put a new adapter on each part named: PEFT's start, that changes nothing.

        Adapters that were there before are left to whoever still has them as `worn`.
        """
        self.freeze()
        self.adapters, self._shape = {}, shape
        for place, part in enumerate(self.parts):
            if part.module in modules:
                down_RH = torch.empty(shape.rank, self.weight_NH.shape[1])
                nn.init.kaiming_uniform_(down_RH, a=math.sqrt(5))
                up_NR = torch.zeros(part.outputs, shape.rank)
                magnitude_N = self._lengths(place) if shape.has_magnitudes else None
                self.adapters[place] = Adapter(
                    nn.Parameter(down_RH),
                    nn.Parameter(up_NR),
                    None if magnitude_N is None else nn.Parameter(magnitude_N),
                )

    @property
    def worn(self) -> "Worn":
        return Worn(self.adapters, self._shape)

    def wear(self, worn: "Worn") -> None:
        """Compute with these adapters from now on."""
        self.adapters, self._shape = worn.adapters, worn.shape

    def freeze(self) -> None:
        self.weight_NH.requires_grad_(False)
        if self.bias_N is not None:
            self.bias_N.requires_grad_(False)

    def merge(self) -> None:
        """Add the adapters to the weights, drop them, and train the weights."""
        with torch.no_grad():
            for place, adapter in self.adapters.items():
                part = slice(place, place + 1)
                ratio_N = self._ratios(part) if self._shape.has_magnitudes else None
                rows_NH = self.weight_NH[self._rows(part)]
                rows_NH += adapter.up_NR @ adapter.down_RH * self._shape.scale
                if ratio_N is not None:
                    rows_NH *= ratio_N[:, None]
        self.adapters = {}
        self.weight_NH.requires_grad_(True)
        if self.bias_N is not None:
            self.bias_N.requires_grad_(True)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        name = "+".join([self.parts[0].module, *(_last(part.module) for part in self.parts[1:])])
        if self.weight_NH.requires_grad:
            yield f"{name}.weight", self.weight_NH
        if self.bias_N is not None and self.bias_N.requires_grad:
            yield f"{name}.bias", self.bias_N
        for place, adapter in self.adapters.items():
            yield f"{self.parts[place].module}.lora_A.weight", adapter.down_RH
            yield f"{self.parts[place].module}.lora_B.weight", adapter.up_NR
            if adapter.magnitude_N is not None:
                yield f"{self.parts[place].module}.lora_magnitude_vector", adapter.magnitude_N

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the weights under the model's own names."""
        for place, part in enumerate(self.parts):
            rows = self._rows(slice(place, place + 1))
            weight_NH = self.weight_NH.detach()[rows]
            yield f"{part.module}.weight", weight_NH.t() if self._is_transposed else weight_NH
            if self.bias_N is not None:
                yield f"{part.module}.bias", self.bias_N.detach()[rows]

    def _rows(self, parts: slice) -> slice:
        start, end, _ = parts.indices(len(self.parts))
        before = sum(part.outputs for part in self.parts[:start])
        return slice(before, before + sum(part.outputs for part in self.parts[start:end]))

    def _cut(self, parts: slice) -> tuple[Tensor, Tensor | None]:
        if parts == slice(None):
            return self.weight_NH, self.bias_N
        rows = self._rows(parts)
        return self.weight_NH[rows], None if self.bias_N is None else self.bias_N[rows]

    def _adapters(self, parts: slice) -> tuple[Tensor, Tensor] | None:
        """The adapters of these parts as one: downs above each other, ups along a diagonal."""
        places = range(*parts.indices(len(self.parts)))
        found = [self.adapters[place] for place in places if place in self.adapters]
        if not found:
            return None
        down_RH = torch.cat([one.down_RH for one in found]) if len(found) > 1 else found[0].down_RH
        blocks = [
            self.adapters[place].up_NR
            if place in self.adapters
            else down_RH.new_zeros(self.parts[place].outputs, 0)
            for place in places
        ]
        up_NR = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]  # type: ignore[no-untyped-call]
        return down_RH, up_NR * self._shape.scale

    def _ratios(self, parts: slice) -> Tensor:
        """By what each output is to be multiplied; 1 where no adapter is.

        The length that is divided by counts as a constant, as the paper (section 4.3) has it.
        """
        found = []
        for place in range(*parts.indices(len(self.parts))):
            adapter = self.adapters.get(place)
            if adapter is None or adapter.magnitude_N is None:
                found.append(self.weight_NH.new_ones(self.parts[place].outputs))
            else:
                found.append(adapter.magnitude_N / self._lengths(place, adapter))
        return torch.cat(found) if len(found) > 1 else found[0]

    @torch.no_grad()
    def _lengths(self, place: int, adapter: Adapter | None = None) -> Tensor:
        """Of each output's weights (N,), an adapter's product added: |w + b A|, squared out, since
        the sum itself would take as much memory as the weights."""
        weight_NH = self.weight_NH[self._rows(slice(place, place + 1))]
        squares_N = self._squares(place, weight_NH)
        if adapter is not None:
            up_NR, down_RH = adapter.up_NR * self._shape.scale, adapter.down_RH
            cross_NR = 2 * (weight_NH @ down_RH.t()) + up_NR @ (down_RH @ down_RH.t())
            squares_N = squares_N + (cross_NR * up_NR).sum(1)
        return squares_N.clamp(min=0).sqrt()

    def _squares(self, place: int, weight_NH: Tensor) -> Tensor:
        """Of frozen weights: worked out once."""
        if place not in self._squared:
            self._squared[place] = torch.linalg.vector_norm(weight_NH, dim=1).square()
        return self._squared[place]


def _decomposed(
    x_TH: Tensor,
    thinned_TH: Tensor | None,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor],
    ratio_N: Tensor,
    plus_TN: Tensor | None,
) -> Tensor:
    """ratio * (x @ weight.T + x @ down.T @ up.T) + bias + plus; see `adapted_linear`.

    With dropout, what the adapter changes is worked out of the thinned inputs, as PEFT has it:
    (ratio - 1) of the frozen product, and the low-rank one.
    """
    weight_NH, bias_N, down_RH, up_NR = weights
    if thinned_TH is None:
        out_TN = adapted_linear(x_TH, weight_NH, None, down_RH, up_NR, None) * ratio_N
    else:
        low_TN = linear(linear(thinned_TH, down_RH, None, None), up_NR, None, None) * ratio_N
        thinned_TN = linear(thinned_TH, weight_NH, None, None) * (ratio_N - 1)
        out_TN = linear(x_TH, weight_NH, None, low_TN + thinned_TN)
    out_TN = out_TN if bias_N is None else out_TN + bias_N
    return out_TN if plus_TN is None else out_TN + plus_TN


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]

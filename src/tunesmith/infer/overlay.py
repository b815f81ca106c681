"""Linear layers of a served base with the adapters of many requests over them in one pass.

T rows, D of them that are a sequence each, H inputs, N outputs of a part, R ranks of all adapters.
The low-rank product: Hu et al. 2021, arXiv:2106.09685. Lengths of outputs (DoRA): Liu et al. 2024,
arXiv:2402.09353.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from tunesmith.nn.packed import Packed, apply
from tunesmith.nn.projection import Part

_LOOSE = 4
"""Ranks that are multiplied with, at most, for each that is worn."""


Owners = tuple[tuple[int, int], ...]
"""Adapters with their counts of ranks, in order."""


@dataclass(frozen=True)
class Patch:
    """One adapter's change of one part."""

    down_RH: Tensor
    up_RN: Tensor
    """The scale is in it."""
    magnitude_N: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Patch":
        """As it is held. Products with rows are worked out in fp32 all the same, but for the first
        one of many adapters at once: what counts is what has to be read."""
        return Patch(self.down_RH.to(dtype), self.up_RN.to(dtype), self.magnitude_N)

    @property
    def rank(self) -> int:
        return self.down_RH.shape[0]

    @property
    def bytes(self) -> int:
        rest = 0 if self.magnitude_N is None else self.magnitude_N.nbytes
        return self.down_RH.nbytes + self.up_RN.nbytes + rest


@dataclass(frozen=True)
class Stretch:
    """Rows `start` to `end` that wear one adapter."""

    start: int
    end: int
    adapter: int


@dataclass
class Dress:
    """Which rows of a step wear which adapter: the first few one each, then stretches."""

    singles: list[int | None]
    stretches: list[Stretch]
    _shares: dict[Owners, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.worn = {each for each in self.singles if each is not None}
        """By rows that are a sequence each."""
        self.is_plain = not self.stretches and not self.worn

    def shares(self, owners: Owners) -> Tensor | None:
        """(D, R): 1 where a row wears the adapter that a rank belongs to. None where most of what
        is loaded is not worn, and a product with all of it would be wasted."""
        if owners not in self._shares:
            self._shares[owners] = self._share(owners)
        return self._shares[owners]

    def _share(self, owners: Owners) -> Tensor | None:
        of_worn = sum(count for adapter, count in owners if adapter in self.worn)
        if sum(count for _, count in owners) > _LOOSE * of_worn:
            return None
        owners_R = torch.tensor([adapter for adapter, count in owners for _ in range(count)])
        rows = [-1 if each is None else each for each in self.singles]
        return (torch.tensor(rows)[:, None] == owners_R).float()


class Overlaid:
    """x @ weight.T + bias of joined parts, and what each row's adapter adds."""

    def __init__(self, packed: Packed, parts: tuple[Part, ...], dtype: torch.dtype) -> None:
        """`dtype` is the adapters' own."""
        self._packed, self._dtype = packed, dtype
        self.parts = parts
        ends = [*accumulate(part.outputs for part in parts)]
        self._columns = [
            slice(end - part.outputs, end) for part, end in zip(parts, ends, strict=True)
        ]
        self._patches: dict[int, dict[int, Patch]] = {}
        """By the adapter, then by the part's place. The tensors are views of the stack's."""
        self._ratios: dict[int, Tensor] = {}
        """Of each adapter that has magnitudes, (N of all parts)."""
        self._stack: _Stack | None = None

    def __call__(self, x_TH: Tensor, dress: Dress, plus_TN: Tensor | None = None) -> Tensor:
        if dress.is_plain or self._stack is None:
            if plus_TN is None:
                return apply(self._packed, x_TH)
            return self._packed.onto(x_TH, plus_TN)
        out_TN = self._packed.product(x_TH)
        self._add_singles(x_TH, dress, out_TN, self._stack)
        for each in dress.stretches:
            rows = slice(each.start, each.end)
            self._add(each.adapter, x_TH[rows], out_TN[rows])
        self._stretch(dress, out_TN)
        if self._packed.bias_N is not None:
            out_TN += self._packed.bias_N
        return out_TN if plus_TN is None else out_TN.add_(plus_TN)

    def put_on(self, adapter: int, patches: Mapping[str, Patch]) -> None:
        """`patches` by the names of modules; those of other layers are left out."""
        own = {
            place: patches[part.module]
            for place, part in enumerate(self.parts)
            if part.module in patches
        }
        if not own:
            return
        ratios_N = torch.ones(self._packed.outputs)
        for place, patch in own.items():
            if patch.magnitude_N is not None:
                columns = self._columns[place]
                ratios_N[columns] = patch.magnitude_N / self._lengths(columns, patch)
                self._ratios[adapter] = ratios_N
        self._patches[adapter] = {place: one.to(self._dtype) for place, one in own.items()}
        self._restack()

    def take_off(self, adapter: int) -> None:
        self._ratios.pop(adapter, None)
        if self._patches.pop(adapter, None):
            self._restack()

    def _restack(self) -> None:
        self._stack = _Stack.of(self._patches) if self._patches else None

    def _add_singles(self, x_TH: Tensor, dress: Dress, out_TN: Tensor, stack: "_Stack") -> None:
        """All at once, where a row's product with adapters that it doesn't wear counts nought; or
        one after the other."""
        if not dress.worn:
            return
        shares_DR = dress.shares(stack.owners)
        if shares_DR is not None:
            singles = slice(0, len(dress.singles))
            low_DR = (x_TH[singles].to(self._dtype) @ stack.down_HR) * shares_DR
            for place, ranks in stack.places.items():
                out_DN = out_TN[singles, self._columns[place]]
                out_DN.addmm_(low_DR[:, ranks], stack.ups[place].float())
            return
        for adapter in dress.worn & self._patches.keys():
            wearers = [row for row, each in enumerate(dress.singles) if each == adapter]
            rows = torch.tensor(wearers, device=x_TH.device)
            some_SN = out_TN[rows]
            self._add(adapter, x_TH[rows], some_SN)
            out_TN[rows] = some_SN

    def _add(self, adapter: int, x_SH: Tensor, out_SN: Tensor) -> None:
        """To rows that wear one adapter."""
        patches = self._patches.get(adapter, {})
        if not patches:
            return
        downs = [patch.down_RH.float() for patch in patches.values()]
        low_SR = x_SH @ (torch.cat(downs) if len(downs) > 1 else downs[0]).t()
        start = 0
        for place, patch in patches.items():
            ranks = slice(start, start + patch.rank)
            out_SN[:, self._columns[place]].addmm_(low_SR[:, ranks], patch.up_RN.float())
            start = ranks.stop

    def _stretch(self, dress: Dress, out_TN: Tensor) -> None:
        """The outputs of adapters with magnitudes, to their lengths."""
        if not self._ratios:
            return
        for row, adapter in enumerate(dress.singles):
            if adapter in self._ratios:
                out_TN[row] *= self._ratios[adapter]
        for each in dress.stretches:
            if each.adapter in self._ratios:
                out_TN[each.start : each.end] *= self._ratios[each.adapter]

    def _lengths(self, columns: slice, patch: Patch) -> Tensor:
        """Of each output's weights with the adapter's product added: |w + b A|, squared out."""
        down_RH, up_RN = patch.down_RH, patch.up_RN
        crossed_RN = self._packed.product(down_RH)[:, columns]
        cross_RN = 2 * crossed_RN + (down_RH @ down_RH.t()) @ up_RN
        squares_N = self._packed.lengths()[columns].square() + (cross_RN * up_RN).sum(0)
        return squares_N.clamp(min=0).sqrt()


@dataclass(frozen=True)
class _Stack:
    """All adapters' patches one above the other, part after part: one product for all."""

    down_HR: Tensor
    ups: dict[int, Tensor]
    """By the part's place, (R of the part, N)."""
    places: dict[int, slice]
    """The ranks of each part."""
    owners: Owners

    @classmethod
    def of(cls, patches: dict[int, dict[int, Patch]]) -> "_Stack":
        """The patches become views of what is made, so that nothing is held twice."""
        order = sorted((place, adapter) for adapter, own in patches.items() for place in own)
        found = [patches[adapter][place] for place, adapter in order]
        down_HR = torch.cat([one.down_RH.t() for one in found], 1).contiguous()
        ends = [*accumulate(one.rank for one in found)]
        ups: dict[int, Tensor] = {}
        places: dict[int, slice] = {}
        for place in sorted({place for place, _ in order}):
            some = [at for at, (one, _) in enumerate(order) if one == place]
            start = ends[some[0]] - found[some[0]].rank
            places[place] = slice(start, ends[some[-1]])
            ups[place] = torch.cat([found[at].up_RN for at in some])
            for at in some:
                ranks = slice(ends[at] - found[at].rank, ends[at])
                patches[order[at][1]][place] = Patch(
                    down_HR[:, ranks].t(),
                    ups[place][ranks.start - start : ranks.stop - start],
                    found[at].magnitude_N,
                )
        owners = tuple((adapter, one.rank) for (_, adapter), one in zip(order, found, strict=True))
        return cls(down_HR, ups, places, owners)

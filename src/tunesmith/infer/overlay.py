"""Linear layers of a served base with the adapters of many requests over them in one pass.

T rows, D of them that are a sequence each, H inputs, N outputs of a part, R ranks of all adapters.
The low-rank product: Hu et al. 2021, arXiv:2106.09685. Lengths of outputs (DoRA): Liu et al. 2024,
arXiv:2402.09353.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.nn.packed import Packed, apply
from tunesmith.nn.projection import Part

_LOOSE = 4
"""Ranks that are multiplied with, at most, for each that is worn."""


@dataclass(frozen=True)
class Patch:
    """One adapter's change of one part."""

    down_RH: Tensor
    up_RN: Tensor
    """The scale is in it."""
    magnitude_N: Tensor | None = None

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
    _shares: dict[tuple[tuple[int, int], ...], Tensor] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        return not self.stretches and not any(each is not None for each in self.singles)

    @property
    def worn(self) -> set[int]:
        return {each for each in self.singles if each is not None} | {
            each.adapter for each in self.stretches
        }

    def shares(self, ranks: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
        """(D, R): 1 where a row wears the adapter that a rank belongs to. `ranks` are adapters
        with their counts of ranks, in order."""
        if ranks not in self._shares:
            owners = [adapter for adapter, count in ranks for _ in range(count)]
            rows = [-1 if each is None else each for each in self.singles]
            owners_R = torch.tensor(owners, device=like.device)
            rows_D1 = torch.tensor(rows, device=like.device)[:, None]
            self._shares[ranks] = (rows_D1 == owners_R).to(like.dtype)
        return self._shares[ranks]


class Overlaid:
    """x @ weight.T + bias of joined parts, and what each row's adapter adds."""

    def __init__(self, packed: Packed, parts: tuple[Part, ...]) -> None:
        self._packed = packed
        self.parts = parts
        self._columns: list[slice] = []
        start = 0
        for part in parts:
            self._columns.append(slice(start, start + part.outputs))
            start += part.outputs
        self._stacks: dict[int, _Stack] = {}
        """By the part's place."""
        self._ratios: dict[int, Tensor] = {}
        """Of each adapter that has magnitudes, (N of all parts)."""

    def __call__(self, x_TH: Tensor, dress: Dress, plus_TN: Tensor | None = None) -> Tensor:
        if dress.is_plain or not self._stacks:
            if plus_TN is None:
                return apply(self._packed, x_TH)
            return self._packed.onto(x_TH, plus_TN)
        out_TN = self._packed.product(x_TH)
        for place, stack in self._stacks.items():
            stack.add(x_TH, dress, out_TN[:, self._columns[place]])
        self._stretch(dress, out_TN)
        if self._packed.bias_N is not None:
            out_TN += self._packed.bias_N
        return out_TN if plus_TN is None else out_TN.add_(plus_TN)

    def put_on(self, adapter: int, patches: Mapping[str, Patch]) -> None:
        """`patches` by the names of modules; those of other layers are left out."""
        ratios_N = torch.ones(self._packed.outputs)
        has_ratios = False
        for place, part in enumerate(self.parts):
            patch = patches.get(part.module)
            if patch is None:
                continue
            self._stacks.setdefault(place, _Stack()).push(adapter, patch)
            if patch.magnitude_N is not None:
                has_ratios = True
                columns = self._columns[place]
                ratios_N[columns] = patch.magnitude_N / self._lengths(columns, patch)
        if has_ratios:
            self._ratios[adapter] = ratios_N

    def take_off(self, adapter: int) -> None:
        self._ratios.pop(adapter, None)
        for place, stack in list(self._stacks.items()):
            stack.pull(adapter)
            if stack.is_empty:
                del self._stacks[place]

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


class _Stack:
    """The patches of one part, one above the other."""

    def __init__(self) -> None:
        self._down_RH = torch.empty(0)
        self._up_RN = torch.empty(0)
        self._ranks: tuple[tuple[int, int], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self._ranks

    def push(self, adapter: int, patch: Patch) -> None:
        if self.is_empty:
            self._down_RH, self._up_RN = patch.down_RH, patch.up_RN
        else:
            self._down_RH = torch.cat([self._down_RH, patch.down_RH])
            self._up_RN = torch.cat([self._up_RN, patch.up_RN])
        self._ranks = (*self._ranks, (adapter, patch.rank))

    def pull(self, adapter: int) -> None:
        rows = self._rows(adapter)
        if rows is None:
            return
        self._down_RH = torch.cat([self._down_RH[: rows.start], self._down_RH[rows.stop :]])
        self._up_RN = torch.cat([self._up_RN[: rows.start], self._up_RN[rows.stop :]])
        self._ranks = tuple(each for each in self._ranks if each[0] != adapter)

    def add(self, x_TH: Tensor, dress: Dress, out_TN: Tensor) -> None:
        """To the rows whose adapter is here."""
        if any(each is not None for each in dress.singles):
            self._add_singles(x_TH[: len(dress.singles)], dress, out_TN[: len(dress.singles)])
        for each in dress.stretches:
            rows = self._rows(each.adapter)
            if rows is not None:
                low_SR = x_TH[each.start : each.end] @ self._down_RH[rows].t()
                out_TN[each.start : each.end].addmm_(low_SR, self._up_RN[rows])

    def _add_singles(self, x_DH: Tensor, dress: Dress, out_DN: Tensor) -> None:
        """All at once, where a row's product with adapters that it doesn't wear counts nought; or
        one after the other, where most of what is loaded is not worn."""
        worn = {each for each in dress.singles if each is not None}
        of_worn = sum(rank for adapter, rank in self._ranks if adapter in worn)
        if self._down_RH.shape[0] > _LOOSE * of_worn:
            for adapter in worn:
                self._add_some(adapter, x_DH, dress, out_DN)
            return
        low_DR = (x_DH @ self._down_RH.t()).mul_(dress.shares(self._ranks, x_DH))
        out_DN.addmm_(low_DR, self._up_RN)

    def _add_some(self, adapter: int, x_DH: Tensor, dress: Dress, out_DN: Tensor) -> None:
        ranks = self._rows(adapter)
        if ranks is None:
            return
        wearers = [row for row, each in enumerate(dress.singles) if each == adapter]
        rows = torch.tensor(wearers, device=x_DH.device)
        out_DN.index_add_(0, rows, x_DH[rows] @ self._down_RH[ranks].t() @ self._up_RN[ranks])

    def _rows(self, adapter: int) -> slice | None:
        start = 0
        for each, rank in self._ranks:
            if each == adapter:
                return slice(start, start + rank)
            start += rank
        return None

"""Keys and values of all sequences, in slots of tensors that many sequences share.

K key and value heads, R room of a slot in tokens, D size of a head.

A room doubles as its sequence grows, and sequences with rooms of one size stand side by side, those
that run before those that are only kept. So attention of all that take one token is one call a
size and layer, and at most half of what it reads is nobody's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tunesmith.infer.rooms import room

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Form:
    """What the keys and values of one token look like."""

    heads: int
    sizes: Sequence[int]
    """Of a head, in each layer."""
    dtype: torch.dtype
    device: str

    @property
    def bytes_per_token(self) -> int:
        element = torch.empty((), dtype=self.dtype).element_size()
        return 2 * self.heads * sum(self.sizes) * element


@dataclass
class Slab(Generic[Owner]):
    """Slots of one size: owners in order, the running ones first."""

    form: Form
    room: int
    keys: list[Tensor] = field(default_factory=list)
    """Of each layer (slots, K, R, D)."""
    values: list[Tensor] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    places: dict[Owner, int] = field(default_factory=dict)
    lengths: dict[Owner, int] = field(default_factory=dict)
    """Tokens that each holds, or is about to: the whole prompt from its first chunk on."""
    running: int = 0

    def take(self, owner: Owner) -> int:
        """A slot among the running ones."""
        if not self.keys or len(self.owners) == self.keys[0].shape[0]:
            self._resize(max(1, 2 * len(self.owners)))
        self.places[owner] = len(self.owners)
        self.owners.append(owner)
        self.lengths[owner] = 0
        self._swap(len(self.owners) - 1, self.running)
        self.running += 1
        return self.running - 1

    def stop(self, slot: int) -> None:
        """Its owner no longer runs, what it holds is kept."""
        self.running -= 1
        self._swap(slot, self.running)

    def give(self, slot: int) -> None:
        """Its owner is gone."""
        if slot < self.running:
            self.stop(slot)
            slot = self.running
        self.lengths[self.owners[slot]] = 0
        self._swap(slot, len(self.owners) - 1)
        gone = self.owners.pop()
        del self.lengths[gone], self.places[gone]
        if 4 * len(self.owners) <= self.keys[0].shape[0]:
            self._resize(2 * len(self.owners))

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        owners = self.owners
        owners[one], owners[other] = owners[other], owners[one]
        self.places[owners[one]], self.places[owners[other]] = one, other
        there, here = (slice(0, self.lengths[owners[place]]) for place in (one, other))
        for layer in (*self.keys, *self.values):
            held = layer[one, :, here].clone()
            layer[one, :, there] = layer[other, :, there]
            layer[other, :, here] = held

    def _resize(self, slots: int) -> None:
        """To twice what is held, so that little is copied in all. What nobody has written
        in yet takes no memory: see `_zeros`."""
        for layers in (self.keys, self.values):
            for number, size in enumerate(self.form.sizes):
                new = _zeros((slots, self.form.heads, self.room, size), self.form)
                if number < len(layers):
                    held = min(slots, len(self.owners))
                    new[:held] = layers[number][:held]
                    layers[number] = new
                else:
                    layers.append(new)


class Slots(Generic[Owner]):
    """The slabs, by their rooms, and where each owner's slot is."""

    def __init__(self, form: Form, longest: int) -> None:
        self.form = form
        self._longest = longest
        self._slabs: dict[int, Slab[Owner]] = {}
        self._rooms: dict[Owner, int] = {}

    def slab(self, owner: Owner) -> Slab[Owner]:
        return self._slabs[self._rooms[owner]]

    def slot(self, owner: Owner) -> int:
        return self.slab(owner).places[owner]

    def ensure(self, owner: Owner, tokens: int, held: int) -> None:
        """Room for so many tokens; the first `held` are moved along."""
        wanted = room(tokens, self._longest)
        old = self._rooms.get(owner)
        if old is not None and old >= wanted:
            self._slabs[old].lengths[owner] = tokens
            return
        slab = self._slabs.setdefault(wanted, Slab(self.form, wanted))
        slot = slab.take(owner)
        slab.lengths[owner] = tokens
        if old is not None:
            source = self._slabs[old]
            place = source.places[owner]
            _copy(source, place, slab, slot, held)
            self._give(source, place)
        self._rooms[owner] = wanted

    def adopt(self, owner: Owner, source: Owner, tokens: int, room_for: int) -> None:
        """A new owner begins with what another's first tokens are."""
        self.ensure(owner, max(tokens, room_for), 0)
        of, to = self.slab(source), self.slab(owner)
        _copy(of, of.places[source], to, to.places[owner], tokens)

    def stop(self, owner: Owner) -> None:
        """Keep what it has for others, out of the way."""
        if owner in self._rooms:
            self.slab(owner).stop(self.slot(owner))

    def free(self, owner: Owner) -> None:
        if owner in self._rooms:
            self._give(self.slab(owner), self.slot(owner))
            del self._rooms[owner]

    @property
    def bytes(self) -> int:
        return sum(layer.nbytes for slab in self._slabs.values() for layer in _layers(slab))

    def _give(self, slab: Slab[Owner], slot: int) -> None:
        slab.give(slot)
        if not slab.owners:
            del self._slabs[slab.room]


def _zeros(shape: tuple[int, ...], form: Form) -> Tensor:
    """On a CPU, of pages that the kernel hands out as they are first written: no step waits for a
    whole slab to be cleared."""
    if form.device != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=form.dtype, device=form.device)
    count = math.prod(shape) * form.dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(form.dtype).view(shape)


def _layers(slab: Slab[Owner]) -> Iterator[Tensor]:
    yield from slab.keys
    yield from slab.values


def _copy(source: Slab[Owner], at: int, target: Slab[Owner], to: int, tokens: int) -> None:
    for old, new in zip(_layers(source), _layers(target), strict=True):
        new[to, :, :tokens] = old[at, :, :tokens]

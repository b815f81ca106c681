"""What the rows of one step look at: those that take one token all at once, prompts one by one.

T rows, B of them of one slab, Q of one prompt, H query heads, K key and value heads, G query heads
for each of those, S tokens seen, D size of a head.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.infer.attention import visible
from tunesmith.infer.scheduler import Chunk
from tunesmith.infer.sequence import Sequence
from tunesmith.infer.slots import Slab, Slots


@dataclass
class Together:
    """Sequences of one slab that take one token each: rows `start` to `end`, in slot order."""

    slab: Slab[Sequence]
    start: int
    end: int
    slots_B: Tensor
    positions_B: Tensor
    is_all: bool
    """Whether they are all that run in the slab."""
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    seen: int = 0
    """Tokens of the longest, the new one included."""

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None
    ) -> Tensor:
        """(B, H, D) of the queries (B, H, D), keys and values (B, K, D)."""
        q_BHD, k_BKD, v_BKD = qkv
        keys, values = self.slab.keys[layer], self.slab.values[layer]
        keys[self.slots_B, :, self.positions_B] = k_BKD
        values[self.slots_B, :, self.positions_B] = v_BKD
        running, heads, size = self.slab.running, keys.shape[1], q_BHD.shape[-1]
        if not self.is_all:
            few, q_BHD = q_BHD, q_BHD.new_zeros(running, *q_BHD.shape[1:])
            q_BHD[self.slots_B] = few
        out = F.scaled_dot_product_attention(
            q_BHD.reshape(running, heads, -1, size),
            keys[:running, :, : self.seen],
            values[:running, :, : self.seen],
            attn_mask=self._mask(window, q_BHD.dtype),
            scale=scale,
        ).reshape(running, -1, values.shape[-1])
        return out if self.is_all else out[self.slots_B]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(slots, 1, 1, S), added to the scores; None where all see all."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window, dtype)
        return self._masks[window]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        last_B1 = self.positions_B[:, None]
        first_B1 = torch.zeros_like(last_B1) if window is None else last_B1 - (window - 1)
        if self.is_all and bool((last_B1 == self.seen - 1).all()) and bool((first_B1 <= 0).all()):
            return None
        places_S = torch.arange(self.seen, device=last_B1.device)
        is_hidden_BS = (places_S > last_B1) | (places_S < first_B1)
        mask = torch.zeros(self.slab.running, self.seen, dtype=dtype, device=last_B1.device)
        mask[self.slots_B] = mask[self.slots_B].masked_fill_(is_hidden_BS, -torch.inf)
        return mask[:, None, None]


@dataclass
class Alone:
    """Some tokens of a prompt: rows `start` to `end`, at `offset` of the sequence."""

    slab: Slab[Sequence]
    slot: int
    start: int
    end: int
    offset: int
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None
    ) -> Tensor:
        """(Q, H, D) of the queries (Q, H, D), keys and values (Q, K, D)."""
        q_QHD, k_QKD, v_QKD = qkv
        keys_KSD, values_KSD = (x[layer][self.slot] for x in (self.slab.keys, self.slab.values))
        reach = slice(self.offset, self.offset + self.end - self.start)
        keys_KSD[:, reach] = k_QKD.transpose(0, 1)
        values_KSD[:, reach] = v_QKD.transpose(0, 1)
        queries, heads = q_QHD.shape[0], keys_KSD.shape[0]
        seen = slice(0 if window is None else max(0, reach.start - window + 1), reach.stop)
        groups = q_QHD.shape[1] // heads
        packed = q_QHD.view(queries, heads, groups, -1).permute(1, 2, 0, 3)
        mask = self._mask(seen.stop - seen.start, window, q_QHD)
        out = F.scaled_dot_product_attention(
            packed.reshape(1, heads, groups * queries, -1),
            keys_KSD[None, :, seen],
            values_KSD[None, :, seen],
            attn_mask=mask if mask is None or groups == 1 else mask.repeat(groups, 1),
            scale=scale,
        )
        return out.view(heads, groups, queries, -1).permute(2, 0, 1, 3).flatten(1, 2)

    def _mask(self, seen: int, window: int | None, like: Tensor) -> Tensor | None:
        key = (seen, window)
        if key not in self._masks:
            queries = self.end - self.start
            may_see = visible(queries, seen - queries, window, like.device)
            self._masks[key] = may_see
        return self._masks[key]


@dataclass
class Sight:
    """Of a whole step. Its chunks are in the order of its rows."""

    chunks: list[Chunk]
    together: list[Together]
    alone: list[Alone]
    rows: int
    """Rows with an owner."""
    dtype: torch.dtype
    """Of keys and values."""

    @classmethod
    def of(cls, chunks: Many[Chunk], slots: Slots[Sequence]) -> "Sight":
        """Gives every chunk its room, and puts those that take one token first."""
        for chunk in chunks:
            slots.ensure(chunk.sequence, chunk.sequence.length, chunk.start)
        by_slab: dict[int, list[Chunk]] = {}
        prompts = []
        for chunk in chunks:
            if chunk.end - chunk.start == 1:
                by_slab.setdefault(slots.slab(chunk.sequence).room, []).append(chunk)
            else:
                prompts.append(chunk)
        ordered, together, at = [], [], 0
        for some in by_slab.values():
            some = sorted(some, key=lambda chunk: slots.slot(chunk.sequence))
            together.append(_together(some, slots, at))
            ordered += some
            at += len(some)
        alone = []
        for chunk in prompts:
            end = at + chunk.end - chunk.start
            slab, slot = slots.slab(chunk.sequence), slots.slot(chunk.sequence)
            alone.append(Alone(slab, slot, at, end, chunk.start))
            ordered.append(chunk)
            at = end
        return cls(ordered, together, alone, at, slots.form.dtype)

    @property
    def singles(self) -> int:
        """Rows, the first ones, that are a sequence each."""
        return self.together[-1].end if self.together else 0

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None
    ) -> Tensor:
        """(T, H, D) of the queries (T, H, D), keys and values (T, K, D). Rows without an owner get
        zeros."""
        q_THD, k_TKD, v_TKD = (part.to(self.dtype) for part in qkv)
        parts: list[Together | Alone] = [*self.together, *self.alone]
        if len(parts) == 1 and self.rows == q_THD.shape[0]:
            return parts[0].attend(layer, (q_THD, k_TKD, v_TKD), scale, window)
        out = q_THD.new_zeros(*q_THD.shape[:2], v_TKD.shape[-1])
        for part in parts:
            rows = slice(part.start, part.end)
            out[rows] = part.attend(layer, (q_THD[rows], k_TKD[rows], v_TKD[rows]), scale, window)
        return out


def _together(chunks: Many[Chunk], slots: Slots[Sequence], at: int) -> Together:
    slab = slots.slab(chunks[0].sequence)
    device = slots.form.device
    positions = [chunk.start for chunk in chunks]
    return Together(
        slab=slab,
        start=at,
        end=at + len(chunks),
        slots_B=torch.tensor([slots.slot(chunk.sequence) for chunk in chunks], device=device),
        positions_B=torch.tensor(positions, device=device),
        is_all=len(chunks) == slab.running,
        seen=max(positions) + 1,
    )

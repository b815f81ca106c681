"""Sequences that go on side by side, a token each at a time, over their keys and values so far.

N prompts, B sequences, K key and value heads, H query heads, G query heads for each of those, D
their size, S columns, V vocabulary entries. Sequences end in the same column: what a shorter prompt
leaves free stands before it. So a new token is one column for all, and a window one slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.nn.attention import AttentionRule
from tunesmith.nn.batch import FlatBatch, flatten
from tunesmith.nn.language import LanguageModel

_ROOM = 64
"""Columns added at once, at least."""


class Decoding:
    """Sequences that each go on from one of the prompts, A of them still."""

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], copies: int, device: str
    ) -> None:
        """Every prompt is worked out once, whatever the copies. It has at least one token."""
        kept: list[tuple[Tensor, Tensor]] | None = [] if model.can_look_back else None
        ends = ends_of(prompts, device, kept)
        self._model, self._device = model, device
        self.logits_AV = model.logits(ends).repeat_interleave(copies, 0)
        """Of the next tokens."""
        self._past = None if kept is None else Past.of(kept, ends.bounds, copies)
        self._ids = [list(one) for one in prompts for _ in range(copies)]
        self._lengths_B = torch.tensor([len(ids) for ids in self._ids], device=device)
        self._rows_A = torch.arange(len(self._ids), device=device)
        """Of those that go on, among those whose past is held."""

    def step(self, ids_A: Tensor, goes_on_A: Tensor) -> None:
        """The next token of each, and which go on after it: at least one, and no other any more."""
        self._rows_A = self._rows_A[goes_on_A]
        ids_A = ids_A[goes_on_A]
        if self._past is None:
            self._step_again(ids_A)
        else:
            self._step_on(ids_A, self._past)

    def _step_on(self, ids_A: Tensor, past: "Past") -> None:
        if 4 * len(self._rows_A) <= 3 * len(self._lengths_B):
            past.keep(self._rows_A)
            self._lengths_B = self._lengths_B[self._rows_A]
            self._rows_A = torch.arange(len(ids_A), device=self._device)
        ids_B = torch.zeros_like(self._lengths_B)
        ids_B[self._rows_A] = ids_A
        past.make_room()
        # Those that have ended may run out of the context; nobody looks at them.
        positions_B = self._lengths_B.clamp(max=self._model.context_length - 1)
        self.logits_AV = self._model.next_logits(ids_B, positions_B, past)[self._rows_A]
        self._lengths_B = self._lengths_B + 1

    def _step_again(self, ids_A: Tensor) -> None:
        """Where the architecture cannot look back: all tokens anew."""
        for row, new in zip(self._rows_A.tolist(), ids_A.tolist(), strict=True):
            self._ids[row].append(new)
        going = [self._ids[row] for row in self._rows_A.tolist()]
        self.logits_AV = self._model.logits(ends_of(going, self._device))


def ends_of(
    prompts: Sequence[Sequence[int]],
    device: str,
    kept: list[tuple[Tensor, Tensor]] | None = None,
) -> FlatBatch:
    """One row for each prompt, its last token's."""
    flat = flatten([(ids, [False] * len(ids)) for ids in prompts], device)
    rows_R = torch.tensor(flat.bounds[1:], device=device) - 1
    return replace(flat, rows_R=rows_R, targets_R=flat.ids_T[rows_R], kept=kept)


@dataclass
class Past:
    """See `attention.Looking`: layers look in turn, from the first to the last and over again."""

    keys: list[Tensor]
    """Of each layer, (B, K, S, D) with room for columns to come."""
    values: list[Tensor]
    hidden_BS: Tensor
    """To be added to scores: minus infinity in columns before a sequence's first token."""
    end: int
    """Columns in use."""
    turn: int = 0

    @classmethod
    def of(
        cls, kept: Sequence[tuple[Tensor, Tensor]], bounds: Sequence[int], copies: int
    ) -> "Past":
        """From the rows of prompts that stand one after the other, each for so many sequences."""
        device = kept[0][0].device
        starts_N = torch.tensor(bounds[:-1], device=device)
        lengths_N = torch.tensor(bounds[1:], device=device) - starts_N
        longest = int(lengths_N.max())
        places_NS = torch.arange(longest + _ROOM, device=device) - (longest - lengths_N)[:, None]
        is_free_NS = places_NS < 0
        rows_NS = (starts_N[:, None] + places_NS).clamp(0, bounds[-1] - 1)
        rows_BS = rows_NS.repeat_interleave(copies, 0)
        hidden_BS = torch.zeros(rows_NS.shape, device=device).masked_fill_(is_free_NS, -torch.inf)

        def laid_out(x_KTD: Tensor) -> Tensor:
            return x_KTD[:, rows_BS].transpose(0, 1).contiguous()

        return cls(
            [laid_out(keys) for keys, _ in kept],
            [laid_out(values) for _, values in kept],
            hidden_BS.repeat_interleave(copies, 0),
            longest,
        )

    def make_room(self) -> None:
        """For one more column."""
        spare = self.hidden_BS.shape[1] - self.end
        assert self.turn == 0, "every layer has looked"
        if spare:
            return
        more = max(_ROOM, self.end // 2)
        self.keys, self.values = (
            [torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], 2) for x in all_layers]
            for all_layers in (self.keys, self.values)
        )
        zeros = self.hidden_BS.new_zeros(self.hidden_BS.shape[0], more)
        self.hidden_BS = torch.cat([self.hidden_BS, zeros], 1)

    def keep(self, rows_B: Tensor) -> None:
        """Of these sequences alone; columns that none of them has go too."""
        hidden_BS = self.hidden_BS[rows_B]
        first = int((hidden_BS[:, : self.end] == 0).any(0).nonzero()[0])
        self.hidden_BS, self.end = hidden_BS[:, first:].contiguous(), self.end - first
        for layers in (self.keys, self.values):
            layers[:] = [x[:, :, first:].index_select(0, rows_B) for x in layers]

    def attend(self, q_HBD: Tensor, k_KBD: Tensor, v_KBD: Tensor, rule: AttentionRule) -> Tensor:
        """The next layer's (B, H, D)."""
        layer, end = self.turn, self.end
        self.keys[layer][:, :, end] = k_KBD.transpose(0, 1)
        self.values[layer][:, :, end] = v_KBD.transpose(0, 1)
        self.turn = (layer + 1) % len(self.keys)
        if self.turn == 0:
            self.end += 1
        first = 0 if rule.window is None else max(0, end + 1 - rule.window)
        seen = slice(first, end + 1)
        return self._mix(
            q_HBD, self.keys[layer][:, :, seen], self.values[layer][:, :, seen], seen, rule
        )

    def _mix(
        self, q_HBD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, seen: slice, rule: AttentionRule
    ) -> Tensor:
        sequences, heads = k_BKSD.shape[:2]
        q_BKGD = q_HBD.transpose(0, 1).reshape(sequences, heads, -1, q_HBD.shape[-1]) * rule.scale
        scores_BKGS = q_BKGD @ k_BKSD.transpose(2, 3)
        if rule.softcap is not None:
            scores_BKGS = rule.softcap * torch.tanh(scores_BKGS.float() / rule.softcap)
        scores_BKGS = scores_BKGS.float() + self.hidden_BS[:, None, None, seen]
        shares_BKGS = scores_BKGS.softmax(-1).to(v_BKSD.dtype)
        return (shares_BKGS @ v_BKSD).reshape(sequences, -1, v_BKSD.shape[-1])

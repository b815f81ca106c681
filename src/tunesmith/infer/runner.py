"""The model as the engine sees it: chunks of sequences in, logits of the next tokens out.

T new tokens of a step, B sequences that get a next token, V vocabulary entries.
"""

from collections import defaultdict
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tunesmith.infer.attention import Cache, Span, Step, running
from tunesmith.infer.model import ServedModel
from tunesmith.infer.scheduler import Chunk
from tunesmith.infer.sequence import Sequence


class Runner:
    """Runs all chunks of a step as one row of tokens, without padding.

    Positions restart in the row with each sequence, and attention stays inside a sequence's own
    cache, so that prompts and single next tokens go through the model together. Sequences of
    different adapters go in forward passes of their own.
    """

    def __init__(self, model: ServedModel, block_tokens: int) -> None:
        self.model = model
        self._block_tokens = block_tokens
        self._caches: dict[Sequence, Cache] = {}

    @torch.inference_mode()
    def forward(self, chunks: Many[Chunk]) -> dict[Sequence, Tensor]:
        """Run the chunks and advance `computed`. Returns (V,) logits for each that is complete;
        those who want more rows are given them."""
        groups: dict[object, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            groups[self._group(chunk)].append(chunk)
        logits: dict[Sequence, Tensor] = {}
        for group in groups.values():
            logits |= self._forward_group(group)
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
        return logits

    def free(self, sequence: Sequence) -> None:
        """Drop a sequence's cache, if it has one."""
        self._caches.pop(sequence, None)

    def _group(self, chunk: Chunk) -> object:
        """What may share a forward pass: one adapter; alone where positions couple sequences."""
        if self.model.is_position_coupled:
            return chunk.sequence
        return chunk.sequence.adapter, wants_hidden(chunk.sequence)

    def _forward_group(self, chunks: list[Chunk]) -> dict[Sequence, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            start = len(ids)
            ids += chunk.sequence.tokens(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            spans.append(Span(self._cache(chunk.sequence), start, len(ids), chunk.start))
        wanted = [
            span.start + row - chunk.start
            for chunk, span in zip(chunks, spans, strict=True)
            for row in chunk.rows
        ]
        with self.model.using(chunks[0].sequence.adapter), running(Step(spans)):
            if wants_hidden(chunks[0].sequence):
                return hand_out(chunks, self.model.hidden(ids, positions))
            return hand_out(chunks, self.model.logits(ids, positions, wanted))

    def _cache(self, sequence: Sequence) -> Cache:
        if sequence not in self._caches:
            self._caches[sequence] = Cache(self._block_tokens)
        return self._caches[sequence]


def wants_hidden(sequence: Sequence) -> bool:
    return sequence.reader is not None and sequence.reader.kind == "hidden"


def hand_out(chunks: Many[Chunk], rows: Tensor) -> dict[Sequence, Tensor]:
    """Give the chunks' wanted rows, one chunk's after the other's, to those who read their
    prompts. Returns the (V,) logits of next tokens."""
    logits: dict[Sequence, Tensor] = {}
    end = 0
    for chunk in chunks:
        sequence = chunk.sequence
        start, end = end, end + len(chunk.rows)
        own = rows[start:end]
        if sequence.reader is not None and sequence.wants_rows(chunk.start):
            sequence.reader.read(chunk.start, own)
        if chunk.is_last and not wants_hidden(sequence):
            logits[sequence] = own[-1]
    return logits

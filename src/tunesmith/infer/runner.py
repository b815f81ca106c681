"""The model as the engine sees it: chunks of sequences in, logits of the next tokens out.

B sequences that get a next token, R rows that are wanted, V vocabulary entries, H hidden size.
"""

from collections import defaultdict
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.infer.hosted import Kind
from tunesmith.infer.model import Net, ServedModel
from tunesmith.infer.scheduler import Adopt, Chunk, Drop, Keep, Move
from tunesmith.infer.sequence import Sequence


@dataclass(frozen=True)
class Next:
    """What the next tokens are to be sampled from."""

    sequences: list[Sequence]
    logits_BV: Tensor


class Runner:
    """Runs all chunks of a step, each where its adapter runs."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def forward(self, chunks: Many[Chunk]) -> Next:
        """Run the chunks and advance `computed`. Returns the logits of those that are complete;
        readers of prompts are given their rows."""
        groups: dict[tuple[Net, Kind], list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            groups[self.model.net(chunk.sequence), _kind(chunk.sequence)].append(chunk)
        parts = [self._forward(*key, group) for key, group in groups.items()]
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
        if len(parts) == 1:
            return parts[0]
        some = [part for part in parts if part.sequences]
        if not some:
            return Next([], torch.empty(0))
        return Next(
            [each for part in some for each in part.sequences],
            torch.cat([part.logits_BV for part in some]),
        )

    @torch.inference_mode()
    def apply(self, move: Move) -> None:
        """What the scheduler has decided about the cache, in its order."""
        if isinstance(move, Adopt):
            self.model.net(move.sequence).adopt(move.sequence, move.source, move.tokens)
        elif isinstance(move, Keep):
            self.model.net(move.sequence).stop(move.sequence)
        elif isinstance(move, Drop):
            for net in self.model.nets:
                net.free(move.sequence)

    def _forward(self, net: Net, kind: Kind, chunks: list[Chunk]) -> Next:
        worn = {
            chunk.sequence: chunk.sequence.adapter
            for chunk in chunks
            if chunk.sequence.adapter is not None
        }
        chunks, rows = net.rows(chunks, worn, kind)
        if all(len(chunk.rows) == 1 and chunk.is_last for chunk in chunks) and kind == "logits":
            sequences = [chunk.sequence for chunk in chunks]
            if not any(each.reader for each in sequences):
                return Next(sequences, rows)
        return hand_out(chunks, rows, kind)


def _kind(sequence: Sequence) -> Kind:
    return "logits" if sequence.reader is None else sequence.reader.kind


def hand_out(chunks: Many[Chunk], rows: Tensor, kind: Kind) -> Next:
    """Give the chunks' wanted rows, one chunk's after the other's, to those who read their prompts.
    Returns the logits of next tokens."""
    sequences: list[Sequence] = []
    last: list[int] = []
    end = 0
    for chunk in chunks:
        start, end = end, end + len(chunk.rows)
        if chunk.sequence.reader is not None and chunk.sequence.wants_rows(chunk.start):
            chunk.sequence.reader.read(chunk.start, rows[start:end])
        if chunk.is_last and kind == "logits":
            sequences.append(chunk.sequence)
            last.append(end - 1)
    return Next(sequences, rows[last] if sequences else torch.empty(0))

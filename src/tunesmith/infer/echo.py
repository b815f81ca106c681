"""A prompt shown before its continuation, with its tokens' log-probabilities where asked for."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from tunesmith.infer.chat import Piece
from tunesmith.infer.detokenize import Detokenizer
from tunesmith.infer.engine import Stream
from tunesmith.infer.logprobs import PromptScores, Said


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's text, and where in it each of its tokens begins."""

    text: str
    ids: Sequence[int] = ()
    offsets: Sequence[int] = ()

    def said(self, reader: object) -> tuple[Said, ...]:
        if not isinstance(reader, PromptScores):
            return ()
        told = zip(self.ids, self.offsets, reader.scores, strict=True)
        return tuple(Said(id_, offset, score) for id_, offset, score in told)


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> Echo:
    """Slow for a long prompt: call it off the event loop."""
    detokenizer = Detokenizer(tokenizer)
    texts: list[str] = []
    offsets: list[int] = []
    length = 0
    for id_ in ids:
        offsets.append(length)
        texts.append(detokenizer.push(id_))
        length += len(texts[-1])
    return Echo("".join([*texts, detokenizer.flush()]), ids, offsets)


async def echoed(
    pieces: AsyncGenerator[Piece, None], stream: Stream, echoes: Sequence[Echo]
) -> AsyncGenerator[Piece, None]:
    """The pieces, each sequence's first with its prompt before it. `echoes`: one a sequence."""
    begun: set[int] = set()
    async with aclosing(pieces):
        async for piece in pieces:
            echo = echoes[piece.index]
            shift = len(echo.text)
            said = tuple(replace(each, offset=each.offset + shift) for each in piece.said)
            if piece.index in begun:
                yield replace(piece, said=said)
                continue
            begun.add(piece.index)
            before = echo.said(stream.sequences[piece.index].reader)
            delta = piece.delta.model_copy(update={"text": echo.text + piece.delta.text})
            yield replace(piece, delta=delta, said=before + said)

"""Next-token training on plain text: documents packed end to end into rows of equal length."""

from collections.abc import Callable
from typing import Any

from tunesmith.data.holdout import Rows
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.data.sampling import Chosen
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.train.batches import Interrupted, Sample, Shuffle
from tunesmith.train.source import read_row

PROBES = 32
"""Documents encoded beforehand, spread over the file, to guess how many rows there will be."""


class BlockSource:
    """Documents in the order of (seed, epoch), each ended by the end-of-text token, cut to blocks.

    The last block of an epoch is as long as what is left, at least two tokens.
    """

    def __init__(
        self,
        rows: Rows,
        renderer: Renderer,
        length: int,
        seed: int | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rows, self._renderer, self._length, self._seed = rows, renderer, length, seed
        self._should_stop = should_stop
        self._drawn = self._documents(0)
        self._seen_bytes = self._seen_tokens = 0
        self._all_bytes = sum(map(self._drawn.size, range(len(self._drawn))))
        self._probed_bytes, self._probed_tokens = self._probe()

    def open(self, epoch: int, position: dict[str, Any] | None = None) -> None:
        self._epoch = epoch
        self._drawn = self._documents(epoch)
        self._order = None if self._seed is None else Shuffle(len(self._drawn), self._seed, epoch)
        self._starts: list[tuple[int, int]] = []
        """(place in the order, tokens) of the documents that the buffer holds a part of."""
        self._buffer: list[int] = []
        self._used = 0
        """Tokens at its beginning that were dealt out: taken off now and then, since all that
        follow have to be moved."""
        self._cursor = self._skipped = 0
        if epoch == 0:
            self._seen_bytes = self._seen_tokens = 0
        if position is None:
            return
        self._cursor = position["cursor"]
        self._refill(position["cursor"], position["end"], position["skipped"])
        self._seen_bytes = position["seen_bytes"]
        self._seen_tokens = position["seen_tokens"]

    def position(self) -> dict[str, Any]:
        """`cursor`: the first document that is not used up; `skipped`: its tokens that are."""
        first = self._starts[0][0] if self._starts else self._cursor
        return {
            "cursor": first,
            "end": self._cursor,
            "skipped": self._skipped,
            "seen_bytes": self._seen_bytes,
            "seen_tokens": self._seen_tokens,
        }

    def pull(self) -> Sample | None:
        while len(self._buffer) - self._used < self._length and self._cursor < len(self._drawn):
            if self._should_stop():
                raise Interrupted
            self._count(*self._append(self._cursor))
            self._cursor += 1
        block = self._buffer[self._used : self._used + self._length]
        if len(block) < 2:
            return None
        self._consume(len(block))
        return Sample.of(block, [True] * len(block))

    def expected(self) -> float:
        sampled = max(1, self._seen_bytes + self._probed_bytes)
        tokens_a_byte = (self._seen_tokens + self._probed_tokens) / sampled
        rest = (self._all_bytes - self._seen_bytes) * tokens_a_byte
        return max(1.0, (self._seen_tokens + rest) / self._length)

    def lines(self, epoch: int, start: dict[str, Any], end: dict[str, Any] | None) -> list[int]:
        drawn = self._documents(epoch)
        order = None if self._seed is None else Shuffle(len(drawn), self._seed, epoch)
        stop = len(drawn) if end is None else end["cursor"] + (end["skipped"] > 0)
        places = [order[at] if order else at for at in range(start["cursor"], stop)]
        return list(dict.fromkeys(read_row(drawn, place).line for place in places))

    def nothing_usable(self) -> JobFailure:
        if isinstance(self._rows, Chosen):
            return JobFailure(
                FailureClass.DATA_ERROR,
                f"sampling draws no text in epoch {self._epoch + 1}",
                "raise its weights, or give it more documents",
            )
        return JobFailure(FailureClass.DATA_ERROR, "the data set holds no text to train on")

    def _count(self, tokens: int, size: int) -> None:
        if self._epoch == 0:
            self._seen_bytes += size
            self._seen_tokens += tokens

    def _append(self, place: int) -> tuple[int, int]:
        """Returns the document's tokens and bytes."""
        index = self._order[place] if self._order else place
        ids = document_ids(self._renderer, read_row(self._drawn, index))
        self._starts.append((place, len(ids)))
        self._buffer += ids
        return len(ids), self._drawn.size(index)

    def _consume(self, tokens: int) -> None:
        self._used += tokens
        if self._used > len(self._buffer) // 2:
            del self._buffer[: self._used]
            self._used = 0
        self._skipped += tokens
        while self._starts and self._skipped >= self._starts[0][1]:
            self._skipped -= self._starts.pop(0)[1]

    def _refill(self, start: int, end: int, skipped: int) -> None:
        for place in range(start, end):
            self._append(place)
        self._cursor = end
        self._consume(skipped)

    def _probe(self) -> tuple[int, int]:
        count = min(PROBES, len(self._drawn))
        places = [i * len(self._drawn) // count for i in range(count)]
        ids = [document_ids(self._renderer, read_row(self._drawn, place)) for place in places]
        return sum(map(self._drawn.size, places)), sum(map(len, ids))

    def _documents(self, epoch: int) -> Rows:
        """Of an epoch, in the order of the file; those that are weighed, as often as drawn."""
        if isinstance(self._rows, Chosen) and self._seed is not None:
            return self._rows.draw(self._seed, epoch)
        return self._rows


def document_ids(renderer: Renderer, row: Row) -> list[int]:
    """A document's tokens and the token that ends it. Raises JobFailure(data_error)."""
    if row.text is None:
        raise JobFailure(
            FailureClass.DATA_ERROR,
            f'line {row.line}: pretraining reads plain text, {{"text": …}} in each line',
        )
    ids = list(renderer.encode_text(row.text))
    if renderer.eos_token_id is not None and (not ids or ids[-1] != renderer.eos_token_id):
        ids.append(renderer.eos_token_id)
    return ids

"""How long the rows of a data set are as training would see them, from a look at some of them."""

from dataclasses import dataclass

from tunesmith.data.fit import Cut, Fitted, fit
from tunesmith.data.render import Renderer, TemplateError
from tunesmith.data.row import Row, RowFault
from tunesmith.data.rows import Rows
from tunesmith.spec.estimate import Measure

MOST_ROWS = 512
FEWEST_ROWS = 4
MOST_BYTES = 2 << 20
"""Of rows that are tokenised; about a second of work."""

SHARED = 1024
"""Tokens: what two answers begin with stands once in a sample that is no longer."""


@dataclass(frozen=True)
class Lengths:
    tokens: int
    labels: int
    shared: int = 0
    answers: int = 1


def measure(index: Rows, renderer: Renderer, cut: Cut | None) -> Measure:
    """Look at up to `MOST_ROWS` rows, spread evenly. Without a cut they are documents to pack.

    Rows with faults count as left out.
    """
    places = _places(index)
    looked = [_lengths(index, at, renderer, cut) for at in places]
    found = [lengths for lengths in looked if lengths is not None]
    kept = max(1, len(found))
    return Measure(
        rows=len(index),
        looked_at=len(places),
        usable=len(found) / max(1, len(places)),
        tokens=sum(one.tokens for one in found) / kept,
        labels=sum(one.labels for one in found) / kept,
        shared=sum(one.shared for one in found) / kept,
        longest=max((one.tokens - one.shared for one in found), default=0),
        answers=max((one.answers for one in found), default=1),
    )


def _places(index: Rows) -> list[int]:
    """Of `FEWEST_ROWS` up: as many as `MOST_BYTES` hold."""
    spread = _spread(len(index), MOST_ROWS)
    size = sum(map(index.size, spread))
    if size <= MOST_BYTES:
        return spread
    return _spread(len(index), max(FEWEST_ROWS, len(spread) * MOST_BYTES // size))


def _spread(rows: int, most: int) -> list[int]:
    count = min(rows, most)
    return [place * rows // count for place in range(count)]


def _lengths(index: Rows, at: int, renderer: Renderer, cut: Cut | None) -> Lengths | None:
    try:
        row = index[at]
        if cut is None:
            return _document(renderer, row)
        sides = [row] if row.rejected is None else [row, row.rejected]
        fitted = [fit(renderer, side, cut) for side in sides]
    except (RowFault, TemplateError):
        return None
    if any(one.left_out for one in fitted):
        return None
    tokens, labels = sum(len(one.ids) for one in fitted), sum(one.labels for one in fitted)
    shared = _shared(*fitted) if len(fitted) == 2 and tokens <= SHARED else 0
    return Lengths(tokens, labels, shared, len(fitted))


def _shared(chosen: Fitted, rejected: Fitted) -> int:
    """Tokens that both begin with, before the first label of either."""
    sides = zip(chosen.ids, rejected.ids, chosen.mask, rejected.mask, strict=False)
    differ = (i for i, (left, right, *labels) in enumerate(sides) if left != right or any(labels))
    return next(differ, min(len(chosen.ids), len(rejected.ids)))


def _document(renderer: Renderer, row: Row) -> Lengths | None:
    """With the token that ends it."""
    if row.text is None:
        return None
    tokens = len(renderer.encode_text(row.text)) + 1
    return Lengths(tokens, tokens)

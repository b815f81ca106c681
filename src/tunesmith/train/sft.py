"""Supervised fine-tuning: rows of a file, encoded when their step comes."""

from array import array
from collections.abc import Callable
from typing import Any

from tunesmith.data.fit import Cut, Fitted, fit
from tunesmith.data.render import Renderer, TemplateError
from tunesmith.data.rows import Row, RowFault, RowIndex
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.train.batches import Interrupted, Sample, Shuffle
from tunesmith.train.omissions import Omissions

__all__ = ["Cut", "RowSource", "read_row"]

KEPT_TOKENS = 8 << 20
"""Encoded tokens held for the next epoch (12 bytes each); rows beyond are encoded again."""


class RowSource:
    """The rows of a file in the order of (seed, epoch), or in the file's where seed is None."""

    def __init__(
        self,
        rows: RowIndex,
        renderer: Renderer,
        cut: Cut,
        seed: int | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.omissions = Omissions()
        """Of the first epoch; the later ones leave out the same rows."""
        self._rows, self._renderer, self._cut, self._seed = rows, renderer, cut, seed
        self._should_stop = should_stop
        self._kept: dict[int, Sample] = {}
        self._room = KEPT_TOKENS
        self._seen = 0
        self._epoch = self._cursor = 0

    def open(self, epoch: int, position: dict[str, Any] | None = None) -> None:
        self._epoch, self._cursor = epoch, 0
        if epoch == 0:
            self._seen, self.omissions = 0, Omissions()
        self._order = None if self._seed is None else Shuffle(len(self._rows), self._seed, epoch)
        if position is not None:
            self._cursor, self._seen = position["cursor"], position["seen"]
            self.omissions = Omissions.restore(position["omissions"])

    def position(self) -> dict[str, Any]:
        return {
            "cursor": self._cursor,
            "seen": self._seen,
            "omissions": self.omissions.state(),
        }

    def pull(self) -> Sample | None:
        while self._cursor < len(self._rows):
            index = self._order[self._cursor] if self._order else self._cursor
            self._cursor += 1
            self._seen += self._epoch == 0
            sample = self._kept.get(index) or self._read(index)
            if sample is not None:
                return sample
            if self._should_stop():
                raise Interrupted
        return None

    def expected(self) -> float:
        if not self._seen:
            return float(len(self._rows))
        kept = self._seen - self.omissions.dropped
        return max(1.0, len(self._rows) * kept / self._seen)

    def nothing_usable(self) -> JobFailure:
        left_out = self.omissions.sentence() or "the file holds no row"
        return JobFailure(
            FailureClass.DATA_ERROR,
            f"no row can be trained on: {left_out}",
            "every row needs an answer of the assistant with weight 1, inside max_length",
        )

    def _read(self, index: int) -> Sample | None:
        row = read_row(self._rows, index)
        fitted = self._fit(row)
        if fitted.notice is not None:
            self.omissions.notices.add(fitted.notice)
        if fitted.is_truncated:
            self._omit("truncated", row.line)
        if fitted.left_out is not None:
            self._omit(fitted.left_out, row.line)
            return None
        sample = Sample.of(array("i", fitted.ids), fitted.mask)
        if len(sample.ids) <= self._room:
            self._room -= len(sample.ids)
            self._kept[index] = sample
        return sample

    def _fit(self, row: Row) -> Fitted:
        """Raises JobFailure(data_error)."""
        try:
            fitted = fit(self._renderer, row, self._cut)
        except TemplateError as error:
            raise JobFailure(
                FailureClass.DATA_ERROR, f"line {row.line}: {error.message}"
            ) from error
        if fitted.left_out == "refused":
            raise JobFailure(
                FailureClass.DATA_ERROR,
                f"line {row.line}: {fitted.length:,} tokens, over max_length "
                f"{self._cut.max_length:,}",
                "shorten the row, raise max_length, or ask for overlong: drop or truncate",
            )
        return fitted

    def _omit(self, reason: str, line: int) -> None:
        if self._epoch == 0:
            self.omissions.add(reason, line)


def read_row(rows: RowIndex, index: int) -> Row:
    """One row. Raises JobFailure(data_error) that names its line."""
    try:
        return rows[index]
    except RowFault as fault:
        raise JobFailure(FailureClass.DATA_ERROR, fault.message) from fault

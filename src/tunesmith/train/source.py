"""Rows of a file, encoded when their step comes, in the order of (seed, epoch)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

from tunesmith.data.fit import Cut, Fitted, fit
from tunesmith.data.holdout import Rows
from tunesmith.data.render import Encoded, Notice, Renderer, TemplateError
from tunesmith.data.rows import Row, RowFault
from tunesmith.errors import FailureClass, JobFailure, ValidationError
from tunesmith.train.batches import Interrupted, S, S_co, Shuffle
from tunesmith.train.omissions import Omissions

KEPT_TOKENS = 8 << 20
"""Encoded tokens held for the next epoch (12 bytes each); rows beyond are encoded again."""


@dataclass
class Notes:
    """What reading a row brought up."""

    reasons: list[str] = field(default_factory=list)
    """Of `omissions.REASONS`."""
    notices: set[Notice] = field(default_factory=set)


class Reader(Protocol[S_co]):
    """From rows to samples."""

    samples_a_row: int

    def read(self, row: Row, place: int, notes: Notes) -> S_co | None:
        """The sample of a place: row `place // samples_a_row`, its first, second, … sample.

        None where it is left out; `notes` then says why. Raises JobFailure(data_error).
        """


class RowSource(Generic[S]):
    """The samples of a file in the order of (seed, epoch), or in the file's where seed is None."""

    def __init__(
        self,
        rows: Rows,
        reader: Reader[S],
        seed: int | None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.omissions = Omissions()
        """Of the first epoch; the later ones leave out the same rows."""
        self.places = len(rows) * reader.samples_a_row
        self.rows, self._reader, self._seed = rows, reader, seed
        self._should_stop = should_stop
        self._kept: dict[int, S] = {}
        self._room = KEPT_TOKENS
        self._seen = 0
        self._epoch = self._cursor = 0

    def share(self, other: "RowSource[S]") -> None:
        """Use the samples that another source of the same rows holds, instead of holding them."""
        self._kept, self._room = other._kept, 0

    def open(self, epoch: int, position: dict[str, Any] | None = None) -> None:
        self._epoch, self._cursor = epoch, 0
        if epoch == 0:
            self._seen, self.omissions = 0, Omissions()
        self._order = None if self._seed is None else Shuffle(self.places, self._seed, epoch)
        if position is not None:
            self._cursor, self._seen = position["cursor"], position["seen"]
            self.omissions = Omissions.restore(position["omissions"])

    def position(self) -> dict[str, Any]:
        return {
            "cursor": self._cursor,
            "seen": self._seen,
            "omissions": self.omissions.state(),
        }

    def pull(self) -> S | None:
        while self._cursor < self.places:
            place = self._order[self._cursor] if self._order else self._cursor
            self._cursor += 1
            self._seen += self._epoch == 0
            sample = self._kept.get(place) or self._read(place)
            if sample is not None:
                return sample
            if self._should_stop():
                raise Interrupted
        return None

    def lines(self, epoch: int, start: dict[str, Any], end: dict[str, Any] | None) -> list[int]:
        order = None if self._seed is None else Shuffle(self.places, self._seed, epoch)
        cursors = range(start["cursor"], self.places if end is None else end["cursor"])
        places = [order[cursor] if order else cursor for cursor in cursors]
        return list(dict.fromkeys(line for place in places for line in self._line(place)))

    def _line(self, place: int) -> list[int]:
        """None where nothing of it is trained on."""
        row = read_row(self.rows, place // self._reader.samples_a_row)
        is_kept = place in self._kept or self._reader.read(row, place, Notes()) is not None
        return [row.line] if is_kept else []

    def sample(self, place: int) -> S:
        """One that was pulled before."""
        found = self._kept.get(place)
        if found is None:
            row = read_row(self.rows, place // self._reader.samples_a_row)
            found = self._reader.read(row, place, Notes())
        assert found is not None, f"place {place} holds no sample"
        return found

    def expected(self) -> float:
        if not self._seen:
            return float(self.places)
        kept = self._seen - self.omissions.dropped
        return max(1.0, self.places * kept / self._seen)

    def nothing_usable(self) -> JobFailure:
        left_out = self.omissions.sentence() or "the file holds no row"
        return JobFailure(
            FailureClass.DATA_ERROR,
            f"no row can be trained on: {left_out}",
            "every row needs an answer of the assistant with weight 1, inside max_length",
        )

    def _read(self, place: int) -> S | None:
        row = read_row(self.rows, place // self._reader.samples_a_row)
        notes = Notes()
        sample = self._reader.read(row, place, notes)
        self.omissions.notices |= notes.notices
        for reason in notes.reasons if self._epoch == 0 else ():
            self.omissions.add(reason, row.line)
        if sample is not None and sample.tokens <= self._room:
            self._room -= sample.tokens
            self._kept[place] = sample
        return sample


def fitting(renderer: Renderer, row: Row, cut: Cut, notes: Notes) -> Fitted | None:
    """The row as it is trained on; None where it is left out. Raises JobFailure(data_error)."""
    try:
        found = fit(renderer, row, cut)
    except TemplateError as error:
        raise _unfit(row, error.message) from error
    if found.left_out == "refused":
        raise _too_long(found.length, row.line, cut)
    if found.notice is not None:
        notes.notices.add(found.notice)
    notes.reasons += ["truncated"] if found.is_truncated else []
    notes.reasons += [found.left_out] if found.left_out is not None else []
    return found if found.left_out is None else None


def encode(renderer: Renderer, row: Row, notes: Notes) -> Encoded | None:
    """An answer of several, uncut, its tokens the labels; None where nothing of it can be learnt.

    Raises JobFailure(data_error).
    """
    try:
        encoded = renderer.encode(row, "completions")
    except TemplateError as error:
        raise _unfit(row, error.message) from error
    except ValidationError:
        notes.reasons.append("masked")
        return None
    if encoded.notice is not None:
        notes.notices.add(encoded.notice)
    return encoded


def fits(cut: Cut, length: int, line: int, notes: Notes) -> bool:
    """Whether a row of so many tokens is kept, cut or not. Raises JobFailure(data_error)."""
    if length <= cut.max_length:
        return True
    if cut.overlong == "refuse":
        raise _too_long(length, line, cut)
    notes.reasons.append("overlong" if cut.overlong == "drop" else "truncated")
    return cut.overlong == "truncate"


def _unfit(row: Row, reason: str) -> JobFailure:
    return JobFailure(FailureClass.DATA_ERROR, f"line {row.line}: {reason}")


def _too_long(length: int, line: int, cut: Cut) -> JobFailure:
    return JobFailure(
        FailureClass.DATA_ERROR,
        f"line {line}: {length:,} tokens, over max_length {cut.max_length:,}",
        "shorten the row, raise max_length, or ask for overlong: drop or truncate",
    )


def read_row(rows: Rows, index: int) -> Row:
    """One row. Raises JobFailure(data_error) that names its line."""
    try:
        return rows[index]
    except RowFault as fault:
        raise JobFailure(FailureClass.DATA_ERROR, fault.message) from fault

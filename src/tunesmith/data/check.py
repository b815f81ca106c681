"""What a data set will be to one model: which rows are too long, and which teach nothing.

Counting every token of a large file is dear, so a row is only tokenised where nothing cheaper
shows that it fits: first its size in bytes, then the sizes of its words, each word tokenised once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import Field

from tunesmith.data.fit import Cut, Overlong, fit_encoded
from tunesmith.data.measure import measure
from tunesmith.data.render import NOTICES, Encoded, Renderer, TemplateError, TrainOn
from tunesmith.data.row import Row, RowFault
from tunesmith.data.rows import Rows
from tunesmith.data.tokens import BreakingTold
from tunesmith.errors import ValidationError
from tunesmith.spec.chat import Message
from tunesmith.spec.estimate import Measure
from tunesmith.spec.strict import Sha256, Strict

_BATCH = 256
_LINES = 20
_MAX_PATTERNS = 256
_MAX_WORDS = 200_000
_UNSHOWN = (
    "the chat template leaves out what the role {role} says; change the rows, or use a model whose "
    "template shows it"
)
_SHARE, _SPARE = 1.05, 8
"""The sum over words is no proof: a row whose sum is nearer than this to the limit is counted."""


class Verdict(Strict):
    """Kept by the file's SHA-256, `renderer`, `max_length`, `overlong` and `train_on`."""

    rows: int
    renderer: Sha256
    """Digest of the tokenizer and template."""
    max_length: int
    overlong: Overlong
    train_on: TrainOn
    tokens: int | None = None
    """In all, where every row was tokenised."""
    tokenised: int = 0
    """Rows."""
    overlong_count: int = 0
    overlong_lines: tuple[int, ...] = ()
    """The first ones."""
    masked_count: int = 0
    """Rows that teach nothing, their answers cut off or no longer different for one."""
    masked_lines: tuple[int, ...] = ()
    cut_off_count: int = 0
    """Rows whose answers lose their end to `overlong: truncate`, and teach the rest."""
    cut_off_lines: tuple[int, ...] = ()
    fault_count: int = 0
    fault_lines: tuple[int, ...] = ()
    notices: tuple[str, ...] = ()
    measure: Measure | None = None
    failure: str | None = Field(None, max_length=4000)
    """Why no job can be run on this, in a sentence."""

    @property
    def is_usable(self) -> bool:
        return self.failure is None


def check_tokens(
    index: Rows,
    renderer: Renderer,
    max_length: int,
    overlong: Overlong = "drop",
    train_on: TrainOn = "completions",
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Look at every row as training would see it; `max_length` in tokens.

    `on_progress` is told rows done and rows in all. Raises nothing for bad rows: see `failure`.
    """
    tally = _Tally(renderer, max_length, overlong, train_on)
    waiting: list[Row] = []
    ruler = _Ruler(renderer, is_exact=overlong == "refuse")
    for at in range(len(index)):
        try:
            row = index[at]
        except RowFault as fault:
            tally.fault(fault.line, fault.message)
            continue
        if (role := ruler.unshown(row)) is not None:
            tally.fault(row.line, f"line {row.line}: {_UNSHOWN.format(role=role)}")
            continue
        if not all(ruler.fits(one, max_length) for one in _sequences(row)):
            waiting.append(row)
        if len(waiting) >= _BATCH:
            tally.count(waiting)
            waiting = []
        if on_progress and at % _BATCH == 0:
            on_progress(at, len(index))
    tally.count(waiting)
    if on_progress:
        on_progress(len(index), len(index))
    looked = measure(index, renderer, tally.cut)
    return tally.verdict(len(index)).model_copy(update={"measure": looked})


class _Tally:
    def __init__(
        self, renderer: Renderer, max_length: int, overlong: Overlong, train_on: TrainOn
    ) -> None:
        self.renderer, self.max_length = renderer, max_length
        self.cut = Cut(max_length, overlong, train_on)
        self.overlong: Overlong = overlong
        self.train_on: TrainOn = train_on
        self.tokens = self.tokenised = self.left_out = 0
        self.long: list[int] = []
        self.masked: list[int] = []
        self.cut_off: list[int] = []
        self.faults: list[int] = []
        self.notices: set[str] = set()
        self.first_fault = self.why = ""

    def fault(self, line: int, message: str) -> None:
        self.first_fault = self.first_fault or message
        self.faults.append(line)

    def count(self, rows: Sequence[Row]) -> None:
        sequences = [one for row in rows for one in _sequences(row)]
        found = iter(self.renderer.encode_many(sequences, self.train_on))
        for row in rows:
            self.judge(row.line, [next(found) for _ in _sequences(row)])

    def judge(self, line: int, sequences: Sequence[Encoded | ValidationError]) -> None:
        """One row: a sample's one sequence, or a pair's two."""
        good = []
        for one in sequences:
            if isinstance(one, TemplateError):
                self.fault(line, f"line {line}: {one.message}")
                return
            if isinstance(one, ValidationError):
                self.why = self.why or one.message
                self.masked.append(line)
                self.left_out += 1
                return
            good.append(one)
        self.take(line, good)

    def take(self, line: int, sequences: Sequence[Encoded]) -> None:
        self.tokenised += 1
        self.tokens += sum(len(one.ids) for one in sequences)
        self.notices |= {NOTICES[one.notice] for one in sequences if one.notice}
        fitted = [fit_encoded(one, self.cut) for one in sequences]
        reasons = {one.left_out for one in fitted}
        is_over = bool(reasons & {"overlong", "refused"})
        are_alike = len({tuple(one.ids) for one in fitted}) < len(fitted)
        is_masked = not is_over and ("masked" in reasons or are_alike)
        if any(one.length > self.max_length for one in fitted):
            self.long.append(line)
        if is_masked:
            self.masked.append(line)
        elif not is_over and any(any(one.mask[self.max_length :]) for one in sequences):
            self.cut_off.append(line)
        self.left_out += is_over or is_masked

    def verdict(self, rows: int) -> Verdict:
        return Verdict(
            rows=rows,
            renderer=self.renderer.digest,
            max_length=self.max_length,
            overlong=self.overlong,
            train_on=self.train_on,
            tokens=self.tokens if self.tokenised == rows else None,
            tokenised=self.tokenised,
            overlong_count=len(self.long),
            overlong_lines=tuple(self.long[:_LINES]),
            masked_count=len(self.masked),
            masked_lines=tuple(self.masked[:_LINES]),
            cut_off_count=len(self.cut_off),
            cut_off_lines=tuple(self.cut_off[:_LINES]),
            fault_count=len(self.faults),
            fault_lines=tuple(self.faults[:_LINES]),
            notices=tuple(sorted(self.notices)),
            failure=self.failure(rows),
        )

    def failure(self, rows: int) -> str | None:
        if not rows:
            return "the data set has no row"
        if self.faults:
            others = self.faults[1:]
            more = f" (and {len(others)} more, line {_few(others)})" if others else ""
            return f"{self.first_fault}{more}"[:4000]
        if self.long and self.overlong == "refuse":
            return (
                f"{len(self.long)} of {rows} rows are longer than {self.max_length} tokens "
                f"(line {_few(self.long)}); raise max_length, shorten them, or ask for "
                "overlong: drop or truncate"
            )
        if self.left_out < rows:
            return None
        if len(self.long) == rows and self.overlong == "drop":
            return (
                f"every row is longer than {self.max_length} tokens; raise max_length or ask for "
                "overlong: truncate"
            )
        why = self.why or "check that answers are not empty and that prompts leave room for them"
        return (
            f"no row has anything to learn within {self.max_length} tokens (line "
            f"{_few(self.masked or self.long)}); {why}"
        )


def _few(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")


class _Ruler:
    """Says that a row fits without tokenising it, where that is certain enough."""

    def __init__(self, renderer: Renderer, is_exact: bool) -> None:
        self.renderer, self.is_exact = renderer, is_exact
        self.bytes_factor = renderer.tokens_per_byte
        self.words: dict[str, int] = {}
        self.frames: dict[tuple[str, ...], int | None] = {}
        self.roles: dict[tuple[object, ...], str | None] = {}

    def unshown(self, row: Row) -> str | None:
        """A role whose messages the template leaves out; looked at once for each order of roles."""
        if not row.messages:
            return None
        pattern = (bool(row.tools), *(said.role for said in row.messages))
        if pattern not in self.roles:
            if len(self.roles) >= _MAX_PATTERNS:
                return None
            left_out = self.renderer.unshown(row.messages, row.tools)
            self.roles[pattern] = left_out[0] if left_out else None
        return self.roles[pattern]

    def fits(self, row: Row, max_length: int) -> bool:
        """The first row of each pattern is never waved through, so that a template's refusal
        and an answer that it does not show come to light.
        """
        frame = self.frame(row)
        if frame is None:
            return False
        texts = list(_texts(row))
        size = sum(len(text.encode()) for text in texts)
        if size * self.bytes_factor + frame <= max_length:
            return True
        if self.is_exact or size / 16 + frame > max_length:
            return False
        words = sum(self.weigh(text) for text in texts)
        return words * _SHARE + _SPARE + frame <= max_length

    def frame(self, row: Row) -> int | None:
        """Tokens that the template puts around a row's texts; None where it must be tokenised."""
        pattern = _pattern(row)
        if pattern is None:
            return None
        if pattern in self.frames:
            return self.frames[pattern]
        if len(self.frames) < _MAX_PATTERNS:
            self.frames[pattern] = self.measured(row)
        return None

    def measured(self, row: Row) -> int | None:
        if not row.messages:
            return len(self.renderer.encode_text("")) + 2
        try:
            short, long = (
                self.renderer.text(_refilled(row.messages, "a" * size)) for size in (1, 11)
            )
        except ValidationError:
            return None
        if len(long) - len(short) > 10 * len(row.messages):
            return None
        return len(self.renderer.encode_text(short)) + 2 * len(row.messages)

    def weigh(self, text: str) -> int:
        """The sum of its words' tokens; blanks beyond one between two words count each."""
        words = text.split()
        known = self.words
        try:
            total = sum(map(known.__getitem__, words))
        except KeyError:
            self.learn([word for word in words if word not in known])
            total = sum(map(known.__getitem__, words))
        blanks = len(text) - sum(map(len, words))
        others = blanks - text.count(" ")
        return total + 3 * others + max(0, blanks - len(words))

    def learn(self, words: Sequence[str]) -> None:
        if len(self.words) + len(words) > _MAX_WORDS:
            self.words.clear()
        new = list(dict.fromkeys(words))
        spaced = [f" {word}" for word in new]
        with BreakingTold():
            found = self.renderer.tokenizer.encode_batch_fast(spaced, add_special_tokens=False)
        self.words.update({word: len(each.ids) for word, each in zip(new, found, strict=True)})


def _sequences(row: Row) -> tuple[Row, ...]:
    return (row,) if row.rejected is None else (row, row.rejected)


def _texts(row: Row) -> Iterator[str]:
    for said in row.messages:
        yield said.content or ""
        yield said.name or ""
    for text in (row.prompt, row.completion, row.text):
        if text:
            yield text


def _pattern(row: Row) -> tuple[str, ...] | None:
    """Rows of one pattern are framed alike; None where tools make each row its own."""
    if row.tools or any(said.tool_calls for said in row.messages):
        return None
    if not row.messages:
        return ("text" if row.text is not None else "pair",)
    return tuple(f"{said.role}{said.weight}{said.name is None}" for said in row.messages)


def _refilled(messages: Sequence[Message], text: str) -> list[Message]:
    changes: dict[str, Any] = {"content": text}
    return [said.model_copy(update=changes) for said in messages]

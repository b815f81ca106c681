"""How the rows of a file are read: which column is which field, what becomes of odd characters."""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from tunesmith.data import formats
from tunesmith.data.row import Row, Wrong
from tunesmith.spec.train import Pretrain, Sft, TrainSpec

Controls = Literal["kept", "refused", "removed"]
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
"""All of them but tab and newline; a carriage return before a line feed is a newline's part."""
_RAW = bytes({*range(32), 127} - {*b"\t\n\r"})
_NEEDED = frozenset(
    (
        *("messages", "conversations", "instruction", "output", "prompt", "completion", "text"),
        *("chosen", "rejected", "responses", "preferred_output", "non_preferred_output"),
    )
)
"""Fields that their format cannot do without."""


@dataclass(frozen=True)
class Reading:
    columns: tuple[tuple[str, str], ...] = ()
    """Field and column, where they were mapped by hand: then the others are ignored."""
    controls: Controls = "kept"
    """Control characters in plain text."""
    with_metadata: bool = False
    """Whether rows are asked for theirs: then a table's column of them is read too."""
    by_rank: bool = False
    """Whether a row's `rank` by itself names an adapter; with `target_modules` it does always."""

    @classmethod
    def of(cls, spec: TrainSpec) -> "Reading":
        if isinstance(spec, Sft) and spec.row_ranks:
            return replace(cls.by(spec.columns), by_rank=True)
        if isinstance(spec, Pretrain):
            plain = cls.by(spec.columns, "removed" if spec.clean else "refused")
            return replace(plain, with_metadata=spec.sampling is not None)
        return cls.by(spec.columns)

    @classmethod
    def by(cls, columns: Mapping[str, str] | None, controls: Controls = "kept") -> "Reading":
        return cls(tuple(sorted((columns or {}).items())), controls)

    @property
    def key(self) -> str:
        """A part of the names that verdicts are kept under; empty for the plain reading."""
        if self == Reading():
            return ""
        more = [*["rank"][: self.by_rank], *["metadata"][: self.with_metadata]]
        told = msgspec.json.encode([self.columns, self.controls, *more])
        return ":" + hashlib.sha256(told).hexdigest()[:32]

    def cleaned(self, body: bytes) -> bytes:
        """A row's bytes without what could not be read at all."""
        return body.translate(None, _RAW) if self.controls == "removed" else body

    def mapped(self, body: bytes, names: Collection[str] = ()) -> bytes:
        """A row's JSON under the names of the fields; `names` as in `chosen`. Raises Wrong."""
        if not self.columns and self.controls != "removed":
            return body
        formats.refuse_duplicates(body)
        return as_json(self.chosen(formats.fields(body), names))

    def chosen(self, found: dict[str, Any], names: Collection[str] = ()) -> dict[str, Any]:
        """By field, what stands in its column; `names` are all columns, where `found` lacks some.

        Raises Wrong where a column that its format needs is not there.
        """
        chosen = found
        if self.columns:
            chosen = {field: found[name] for field, name in self.columns if name in found}
            missing = [each for each in self.columns if each[0] in _NEEDED - chosen.keys()]
            if missing:
                raise _no_column(*missing[0], names or found)
        text = chosen.get("text")
        return chosen | {"text": self.plain(text)} if isinstance(text, str) else chosen

    def plain(self, text: str) -> str:
        return _CONTROL.sub("", text) if self.controls == "removed" else text

    def checked(self, row: Row) -> Row:
        """Raises Wrong for a control character in plain text."""
        if self.controls != "refused" or row.text is None:
            return row
        found = _CONTROL.search(row.text)
        if found is None:
            return row
        raise Wrong(
            f"the control character U+{ord(found[0]):04X} at character {found.start() + 1}; "
            "remove it, or ask for clean: true, which removes all of them",
            "text",
        )


def as_json(found: dict[str, Any]) -> bytes:
    """Raises Wrong."""
    try:
        return msgspec.json.encode(found)
    except (OverflowError, ValueError, RecursionError) as error:
        raise Wrong(f"a value that cannot be read: {str(error)[:120]}") from None


def _no_column(field: str, column: str, names: Collection[str]) -> Wrong:
    here = ", ".join(repr(name[:40]) for name in list(names)[:8]) or "none"
    return Wrong(
        f"there is no column {column[:80]!r}, which {field} was mapped to; the columns are {here}",
        field,
    )

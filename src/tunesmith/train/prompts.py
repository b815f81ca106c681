"""What rows ask, as samples: the prompts that completions are drawn for."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.asked import asked
from tunesmith.data.fit import Cut
from tunesmith.data.render import Renderer, TemplateError
from tunesmith.data.rows import Row
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.train.source import Notes, fits


@dataclass(frozen=True, slots=True)
class Prompt:
    place: int
    """Of its row in the file."""
    ids: Sequence[int]

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> int:
        return 0


@dataclass(frozen=True)
class PromptReader:
    """A row is a prompt; one that is cut loses its beginning."""

    renderer: Renderer
    cut: Cut
    """Of prompts: what is left of the longest length beside the longest completion."""
    samples_a_row: int = 1

    def read(self, row: Row, place: int, notes: Notes) -> Prompt | None:
        ids = prompt_ids(self.renderer, row)
        if not ids:
            notes.reasons.append("empty")
            return None
        if not fits(self.cut, len(ids), row.line, notes):
            return None
        return Prompt(place, array("i", ids[-self.cut.max_length :]))


def prompt_ids(renderer: Renderer, row: Row) -> list[int]:
    """What a model is given to answer a row. Raises JobFailure(data_error)."""
    found = asked(row)
    if found.prompt is not None:
        return renderer.encode_text(found.prompt)
    try:
        return renderer.prompt_ids(found.messages, found.tools)
    except TemplateError as error:
        raise JobFailure(FailureClass.DATA_ERROR, f"line {row.line}: {error.message}") from error

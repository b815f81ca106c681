"""A row as it is trained on: encoded, cut to the longest length, or left out, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.data.render import Encoded, Notice, Renderer, TemplateError, TrainOn
from tunesmith.data.row import Row
from tunesmith.errors import ValidationError

Overlong = Literal["drop", "truncate", "refuse"]
LeftOut = Literal["overlong", "refused", "masked"]


@dataclass(frozen=True)
class Cut:
    """What becomes of long rows, and what counts as a label."""

    max_length: int
    overlong: Overlong
    train_on: TrainOn = "completions"


@dataclass(frozen=True, slots=True)
class Fitted:
    """`mask[i]`: token i is a label. Of a row that is left out for its length, all its tokens."""

    ids: Sequence[int]
    mask: Sequence[bool]
    length: int
    """Tokens before anything was cut off."""
    is_truncated: bool = False
    left_out: LeftOut | None = None
    notice: Notice | None = None
    why: str = ""
    """Why nothing of it can be learnt, where the renderer says so."""

    @property
    def labels(self) -> int:
        """The first token of a sample is predicted from nothing, so it is none."""
        return sum(self.mask[1:])


def fit(renderer: Renderer, row: Row, cut: Cut) -> Fitted:
    """Raises TemplateError where the chat template refuses the row."""
    try:
        encoded = renderer.encode(row, cut.train_on)
    except TemplateError:
        raise
    except ValidationError as error:
        return Fitted((), (), 0, left_out="masked", why=error.message)
    return fit_encoded(encoded, cut)


def fit_encoded(encoded: Encoded, cut: Cut) -> Fitted:
    length, limit = len(encoded.ids), cut.max_length
    if length > limit and cut.overlong != "truncate":
        reason: LeftOut = "refused" if cut.overlong == "refuse" else "overlong"
        return Fitted(encoded.ids, encoded.mask, length, left_out=reason, notice=encoded.notice)
    mask = encoded.mask[:limit]
    return Fitted(
        ids=encoded.ids[:limit],
        mask=mask,
        length=length,
        is_truncated=length > limit,
        left_out=None if any(mask[1:]) else "masked",
        notice=encoded.notice,
    )

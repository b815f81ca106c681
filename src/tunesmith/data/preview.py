"""What a row becomes: its tokens, which of them are learnt, and what is left out of it and why."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tunesmith.data.fit import Cut, Fitted, fit
from tunesmith.data.render import NOTICES, Renderer, TemplateError
from tunesmith.data.row import Row
from tunesmith.data.spelled import Speller
from tunesmith.errors import ValidationError
from tunesmith.spec.strict import Strict

Fate = Literal["trained", "truncated", "dropped", "masked", "refused"]
MAX_SHOWN = 65_536
"""Tokens."""


class Token(Strict):
    id: int
    text: str
    """A part of a character reads as its bytes, `\\xed\\x95`."""
    is_bytes: bool
    weight: int
    """1: learnt, predicted from all before it. 0: seen only."""


class Preview(Strict):
    fate: Fate
    why: str = Field("", max_length=4000)
    """Why not all of it is trained on, or anything else that is worth knowing."""
    length: int
    """Tokens, before anything is cut off."""
    trained_tokens: int
    """Tokens that are learnt; 0 for a row that is left out."""
    ids: tuple[int, ...]
    """As trained on: after the template and the cut. Of a row that is left out, or refused, the
    first `limit`."""
    weights: tuple[int, ...]
    tokens: tuple[Token, ...]
    """The first `limit` of them, each by itself."""
    text: str
    template: str | None
    """`model`; `alpaca`, `chatml`, `plain` for one of ours; None where the row needs none."""


def preview_row(renderer: Renderer, row: Row, cut: Cut, limit: int) -> Preview:
    """Never fails for what the row is: a template's refusal is told in `why`."""
    template = renderer.template_source if row.messages else None
    try:
        fitted = fit(renderer, row, cut)
    except TemplateError as error:
        return _empty("refused", error.message, template)
    if not fitted.length:
        return _empty("masked", fitted.why, template)
    fate, why = _fate(fitted, cut)
    shown = slice(None) if fitted.left_out is None else slice(limit)
    return Preview(
        fate=fate,
        why=why,
        length=fitted.length,
        trained_tokens=fitted.labels if fitted.left_out is None else 0,
        ids=tuple(fitted.ids[shown]),
        weights=_weights(fitted.mask[shown]),
        tokens=_tokens(renderer, fitted.ids, fitted.mask, limit),
        text=_text(renderer, row),
        template=template,
    )


def preview_block(renderer: Renderer, ids: Sequence[int], limit: int) -> Preview:
    """A block of documents packed end to end: every token but the first is learnt."""
    mask = [True] * len(ids)
    return Preview(
        fate="trained",
        length=len(ids),
        trained_tokens=len(ids) - 1,
        ids=tuple(ids),
        weights=_weights(mask),
        tokens=_tokens(renderer, ids, mask, limit),
        text=renderer.decode(ids, skip_special=False),
        template=None,
    )


def _fate(fitted: Fitted, cut: Cut) -> tuple[Fate, str]:
    over = f"{fitted.length:,} tokens, over max_length {cut.max_length:,}"
    if fitted.left_out == "refused":
        return "refused", f"{over}: overlong is refuse, so no job is run on this data"
    if fitted.left_out == "overlong":
        return "dropped", f"{over}: overlong is drop, so the row is left out"
    if fitted.left_out == "masked" and fitted.is_truncated:
        return "masked", f"{over}: nothing to learn is left of it, so the row is left out"
    if fitted.left_out == "masked":
        return "masked", "no token of it is to be learnt, so the row is left out"
    notice = NOTICES[fitted.notice] if fitted.notice else ""
    return (
        ("truncated", f"{over}: cut off at its end") if fitted.is_truncated else ("trained", notice)
    )


def _empty(fate: Fate, why: str, template: str | None) -> Preview:
    return Preview(
        fate=fate,
        why=why[:4000],
        length=0,
        trained_tokens=0,
        ids=(),
        weights=(),
        tokens=(),
        text="",
        template=template,
    )


def _weights(mask: Sequence[bool]) -> tuple[int, ...]:
    """The first token of a sample is predicted from nothing."""
    return tuple(int(is_label and at > 0) for at, is_label in enumerate(mask))


def _tokens(
    renderer: Renderer, ids: Sequence[int], mask: Sequence[bool], limit: int
) -> tuple[Token, ...]:
    spelled = Speller(renderer.tokenizer).spell(ids[:limit])
    return tuple(
        Token(id=token_id, text=each.text, is_bytes=each.is_bytes, weight=weight)
        for token_id, each, weight in zip(ids, spelled, _weights(mask), strict=False)
    )


def _text(renderer: Renderer, row: Row) -> str:
    try:
        return renderer.shown(row)
    except ValidationError:  # a template with a clock of its own
        return ""

"""Rows that name the adapter that they are to train, by `target_modules` and `rank`."""

from typing import Annotated, Any

import msgspec

from tunesmith.data.row import Format, RowAdapter, Wrong

MAX_RANK = 1024
MAX_TARGETS = 256
FORMATS: frozenset[Format] = frozenset({"openai", "alpaca", "prompt_completion", "sharegpt"})
"""Of rows that can have an adapter of their own."""
TARGETS, RANK = "target_modules", "rank"
MARK = b'"target_modules"'
_RANK_MARK = b'"rank"'
ALL_LINEAR = "all-linear"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[\w.\-]+$")]
_Names = Annotated[list[_Name], msgspec.Meta(min_length=1, max_length=MAX_TARGETS)]


class _Named(msgspec.Struct):
    target_modules: _Names | None = None
    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] | None = None


def find(body: bytes, format: Format, *, by_rank: bool) -> RowAdapter | None:
    """Of a row's JSON; None where it names none. Raises Wrong.

    A `rank` without `target_modules` counts only `by_rank`: a column of that name may mean
    anything.
    """
    has_targets = MARK in body
    if format not in FORMATS or not (has_targets or (by_rank and _RANK_MARK in body)):
        return None
    given = msgspec.json.decode(body)
    if given.get(TARGETS) is None and not by_rank:
        return None
    try:
        named = msgspec.convert({TARGETS: _listed(given), RANK: _number(given.get(RANK))}, _Named)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from None
    if named.target_modules is None and named.rank is None:
        return None
    targets = None if named.target_modules is None else tuple(sorted({*named.target_modules}))
    return RowAdapter(targets, named.rank)


def _listed(given: dict[str, Any]) -> Any:
    """A list, or one text with commas, as a table's cell holds it."""
    found = given.get(TARGETS)
    return [name.strip() for name in found.split(",")] if isinstance(found, str) else found


def _number(found: Any) -> Any:
    return int(found) if isinstance(found, str) and found.isdecimal() else found


def _wrong(message: str) -> Wrong:
    is_rank = "$.rank" in message
    right = f"a whole number from 1 to {MAX_RANK}"
    if not is_rank:
        right = f'a list of module names such as ["q_proj", "v_proj"], at most {MAX_TARGETS}'
    return Wrong(f"{right} is wanted ({message})", RANK if is_rank else TARGETS)

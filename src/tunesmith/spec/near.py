"""The name that was probably meant."""

import difflib
from collections.abc import Iterable


def near_name(wanted: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    near = difflib.get_close_matches(wanted, list(known), 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""

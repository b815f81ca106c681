"""A configuration with some of its keys said anew, as a run may."""

from collections.abc import Mapping
from typing import Any

from tunesmith.spec.tasks.keys import KEYS
from tunesmith.spec.yaml_guard import Document


def overridden(document: Document, said: Mapping[str, Any]) -> Document:
    """Each key of `said` takes the place of its like, however that is spelled there."""
    replaced = {word for key in said for word in _like(key)}
    value = {word: old for word, old in document.value.items() if word not in replaced}
    lines = {path: line for path, line in document.lines.items() if path[0] not in replaced}
    return Document(value | dict(said), lines)


def _like(word: str) -> set[str]:
    """Every spelling of what a word says; the word itself where it is unknown."""
    places = {key.place for key in KEYS if word in key.spellings}
    return {word}.union(*(key.spellings for key in KEYS if key.place in places))

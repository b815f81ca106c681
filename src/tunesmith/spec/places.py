"""Fields of a specification by their dotted names, as `optim.learning_rate`."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def places(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field's name, those of inner models too."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from places(inner, f"{prefix}{name}.")


def put(values: dict[str, Any], place: str, value: Any) -> None:
    """Into nested mappings, made where they lack."""
    *outer, last = place.split(".")
    for part in outer:
        values = values.setdefault(part, {})
    values[last] = value


def at(values: Any, place: str) -> Any:
    """None where one of its outer fields is None, or not there."""
    for part in place.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in {Union, types.UnionType, Annotated}:
        for part in get_args(annotation):
            yield from _models_in(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation

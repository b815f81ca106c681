"""A training specification in a file: read, checked, with the nearest known name for a typo."""

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic import ValidationError as PydanticError

from tunesmith.cli.near import names_in, near_name
from tunesmith.errors import NotFoundError, ValidationError
from tunesmith.spec import yaml_guard
from tunesmith.spec.train import AnySpec, TrainSpec

_METHODS: dict[str, type[AnySpec]] = {
    kind.model_fields["method"].default: kind for kind in get_args(AnySpec)
}
_ADAPTER: TypeAdapter[AnySpec] = TypeAdapter(TrainSpec)
_LISTED = " or ".join([", ".join(list(_METHODS)[:-1]), list(_METHODS)[-1]])

EXAMPLE = """\
# A LoRA fine-tune. Paths are relative to the folder you start it from.
method: sft                   # or pretrain, dpo, kto, orpo, cpo, simpo, reward
model: models/base            # a folder with config.json, weights and a tokenizer
dataset: data/train.jsonl     # {"messages": [...]}, Alpaca, prompt/completion or ShareGPT
# eval_dataset: data/eval.jsonl
max_length: 1024
lora:                         # `lora: null` trains every weight
  rank: 8
  alpha: 16
  targets: all-linear
optim:
  learning_rate: 2e-4
  epochs: 3
  batch_size: 4
  scheduler: cosine
  warmup_ratio: 0.03
  seed: 42
run:
  save_seconds: 60
"""


def read_spec(path: Path) -> AnySpec:
    """Raises NotFoundError, or ValidationError with one entry for each fault."""
    try:
        with path.open("rb") as file:
            body = file.read(yaml_guard.MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(
            f"no file {str(path)!r}{near_name(path.name, names_in(path.parent))}"
        ) from None
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror}") from None
    return parse_spec(yaml_guard.load(body), path.name)


def parse_spec(value: Any, name: str = "the specification") -> AnySpec:
    if not isinstance(value, dict):
        raise ValidationError(f"{name} holds no fields; `tunesmith train --example` prints one")
    value = {"method": "sft", **value}
    try:
        return _ADAPTER.validate_python(value)
    except PydanticError as error:
        details = [_entry(fault, value["method"]) for fault in _faults(error)]
    message = f"{name}: {details[0]['msg']}" if len(details) == 1 else f"{name} is not valid"
    raise ValidationError(message, details=details if len(details) > 1 else [])


def schema() -> dict[str, Any]:
    """The JSON schema of the file."""
    return _ADAPTER.json_schema()


def _faults(error: PydanticError) -> list[dict[str, Any]]:
    return [dict(fault) for fault in error.errors(include_url=False, include_context=True)]


def _entry(fault: dict[str, Any], method: Any) -> dict[str, Any]:
    path = [str(part) for part in fault["loc"]]
    if path and path[0] == method:
        path = path[1:]
    place = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return {"loc": [], "msg": f"unknown field {place!r}{_suggestion(path, method)}"}
    if fault["type"] == "missing":
        return {"loc": [], "msg": f"{place!r} is missing"}
    if fault["type"] == "union_tag_invalid":
        return {"loc": [], "msg": f"method {method!r} is unknown; write {_LISTED}"}
    return {"loc": [], "msg": f"{place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"}


def _suggestion(path: list[str], method: Any) -> str:
    known = list(_names(_METHODS[method]))
    wanted = ".".join(path)
    same_leaf = [name for name in known if name.split(".")[-1] == path[-1]]
    prefix = ".".join(path[:-1])
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    near = same_leaf or difflib.get_close_matches(wanted, siblings, 1, 0.6)
    near = near or difflib.get_close_matches(wanted, known, 1, 0.6)
    near = near or [
        name
        for leaf in difflib.get_close_matches(path[-1], [n.split(".")[-1] for n in known], 1)
        for name in known
        if name.split(".")[-1] == leaf
    ]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(sorted(siblings))}" if siblings else ""


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field's dotted name, those of inner models too."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _names(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in {Union, types.UnionType, Annotated}:
        for part in get_args(annotation):
            yield from _models_in(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation

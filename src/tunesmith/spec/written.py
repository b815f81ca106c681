"""A training configuration that somebody wrote: in a task's words, or in the specification's own.

Where `task_type` stands it is a task's (`spec/tasks/`); where `method` does it is a specification;
with neither it is a specification of method sft.
"""

import difflib
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic import ValidationError as PydanticError

from tunesmith.errors import ValidationError
from tunesmith.spec import yaml_guard
from tunesmith.spec.configuration import Configuration
from tunesmith.spec.faults import Fault, plain, refusal, told_by
from tunesmith.spec.places import places
from tunesmith.spec.tasks.config import TASK_TYPE, read_config
from tunesmith.spec.tasks.tasks import TASKS
from tunesmith.spec.train import AnySpec, TrainSpec
from tunesmith.spec.yaml_guard import Document

METHOD = "method"
_METHODS: dict[str, type[AnySpec]] = {
    kind.model_fields[METHOD].default: kind for kind in get_args(AnySpec)
}
_ADAPTER: TypeAdapter[AnySpec] = TypeAdapter(TrainSpec)
_LISTED = " or ".join([", ".join(list(_METHODS)[:-1]), list(_METHODS)[-1]])
_ADVICE = f" (a task's keys want task_type: {', '.join(TASKS)})"


def parse(text: str | bytes, name: str = "the configuration") -> Configuration:
    """What YAML, or JSON, says. Raises ValidationError with one entry for each fault."""
    return interpret(yaml_guard.read(text), name)


def interpret(document: Document, name: str = "the configuration") -> Configuration:
    """Raises ValidationError with one entry for each fault."""
    written = document.value
    if not isinstance(written, dict) or not written:
        raise ValidationError(f"{name} holds no fields; `tunesmith train --example` prints one")
    if TASK_TYPE in written and METHOD in written:
        fault = Fault(
            "task_type is for a task's keys, method for a specification's: write one of them",
            METHOD,
            document.lines.get((METHOD,)),
        )
        raise refusal([fault], name)
    if TASK_TYPE in written:
        return read_config(document, name)
    return _native(document, name)


def schema() -> dict[str, Any]:
    """The JSON schema of a specification."""
    return _ADAPTER.json_schema()


def _native(document: Document, name: str) -> Configuration:
    value = {METHOD: "sft", **document.value}
    try:
        spec = _ADAPTER.validate_python(value)
    except PydanticError as error:
        told = told_by(error)
        raise refusal([_fault(one, value[METHOD], document) for one in told], name) from None
    return Configuration(spec, spec.model_dump(mode="json"))


def _fault(fault: dict[str, Any], method: Any, document: Document) -> Fault:
    path = list(fault["loc"])
    if path and path[0] == method:
        path = path[1:]
    line = _line(document, path or [METHOD])
    place = ".".join(str(part) for part in path)
    if fault["type"] == "extra_forbidden":
        near = _suggestion(place, method)
        advice = "" if METHOD in document.value else _ADVICE
        return Fault(f"unknown field {place!r}{near}{advice}", line=line)
    if fault["type"] == "missing":
        return Fault(f"{place!r} is missing", line=line)
    if fault["type"] == "union_tag_invalid" and not path:
        return Fault(f"method {str(method)[:60]!r} is unknown; write {_LISTED}", line=line)
    return Fault(f"{place}: {plain(fault)}" if place else plain(fault), line=line)


def _line(document: Document, path: list[Any]) -> int | None:
    """Of the nearest that was written, outwards."""
    for length in range(len(path), 0, -1):
        if tuple(path[:length]) in document.lines:
            return document.lines[tuple(path[:length])]
    return None


def _suggestion(wanted: str, method: Any) -> str:
    known = list(places(_METHODS[method]))
    prefix, _, leaf = wanted.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == prefix]
    near = [name for name in known if name.split(".")[-1] == leaf]
    near = near or difflib.get_close_matches(wanted, siblings, 1, 0.6)
    near = near or difflib.get_close_matches(wanted, known, 1, 0.6)
    near = near or [
        name
        for close in difflib.get_close_matches(leaf, [name.split(".")[-1] for name in known], 1)
        for name in known
        if name.split(".")[-1] == close
    ]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(sorted(siblings))}" if siblings else ""

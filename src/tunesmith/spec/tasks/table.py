"""The keys of the tasks as a table for people, made from the data that they are read by."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tunesmith.spec.places import at, put
from tunesmith.spec.tasks.keys import KEYS, OUTPUT_DIR, Key
from tunesmith.spec.tasks.tasks import TASKS, Task
from tunesmith.spec.train import Lora

_HEAD = ("key", "what it is", *TASKS, "also written")
_REQUIRED = ("model", "dataset")


def table() -> str:
    """In Markdown. A cell: the default, ✓ where there is none, – where the key is unknown."""
    rows = [_HEAD, tuple("---" for _ in _HEAD), *(_row(key) for key in KEYS)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(key: Key) -> tuple[str, ...]:
    cells = [_cell(key, task) for task in TASKS.values()]
    also = ", ".join(f"`{word}`" for word in key.aliases)
    return (f"`{key.name}`", key.told, *cells, also)


def _cell(key: Key, task: Task) -> str:
    reading = [name for name in task.algorithms if key in task.reads(name)]
    if not reading:
        return "–"
    if key.place in _REQUIRED:
        return "required"
    defaults = {name: _default(key, task, name) for name in reading}
    told = defaults[reading[0]] if len(set(defaults.values())) == 1 else "by algorithm"
    is_some = len(reading) < len(task.algorithms)
    return ": ".join(filter(None, (", ".join(reading) if is_some else "", told)))


def _default(key: Key, task: Task, algorithm: str) -> str:
    value = None
    if not key.is_shorthand and key.place != OUTPUT_DIR:
        value = at(table_defaults(task, algorithm), key.place)
    return "✓" if value is None or value == {} else f"`{_shown(value)}`"


def table_defaults(task: Task, algorithm: str) -> Mapping[str, Any]:
    """Of the specification, and of the adapters where there are any; then the task's own."""
    fields = task.algorithms[algorithm].model_fields
    found = {
        name: _plain(field.get_default())
        for name, field in fields.items()
        if not field.is_required()
    }
    if "lora" in fields:
        found["lora"] = Lora().model_dump()
    for place, value in task.defaults.items():
        if value:
            put(found, place, value)
    return found


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(one.kind for one in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)

"""From a task's configuration, as it was written, to the specification that it means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic import ValidationError as PydanticError

from tunesmith.spec.configuration import Configuration
from tunesmith.spec.faults import MAX_FAULTS, Fault, faults_of, refusal
from tunesmith.spec.near import near_name
from tunesmith.spec.places import at, put
from tunesmith.spec.strict import Name
from tunesmith.spec.tasks.batch import share_out
from tunesmith.spec.tasks.keys import GLOBAL_BATCH, KEYS, OUTPUT_DIR, Key
from tunesmith.spec.tasks.tasks import ANY, HOLDOUT, TASKS, Task
from tunesmith.spec.train import AnySpec
from tunesmith.spec.yaml_guard import Document

TASK_TYPE, ALGORITHM = "task_type", "algorithm"
_LORA, _QUANTIZATION, _EVALUATION = "lora", "run.quantization", "eval_dataset"
_COUNT: TypeAdapter[int] = TypeAdapter(int)
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_LONGEST = 80
"""Characters of an unknown key that are looked at."""


def read_config(document: Document, name: str = "the configuration") -> Configuration:
    """Raises ValidationError, with an entry for each fault: its line, its key, what is right."""
    return _Reader(document, name).read()


@dataclass(frozen=True)
class _Said:
    """One thing that the configuration says."""

    spelling: str
    value: Any
    """As the specification has it."""


Said = dict[str, _Said]
"""By place."""


class _Reader:
    def __init__(self, document: Document, name: str) -> None:
        self._written: dict[str, Any] = document.value
        self._lines, self._name = document.lines, name
        self._faults: list[Fault] = []

    def read(self) -> Configuration:
        task = TASKS[self._one_of(TASK_TYPE, TASKS)]
        algorithm = self._algorithm(task)
        said = self._said(task, algorithm)
        self._check_adapters(task, said)
        spec = self._spec(task, algorithm, said)
        output_dir = self._output_dir(said)
        if spec is None or self._faults:
            raise refusal(self._faults, self._name)
        return Configuration(
            spec=spec,
            asked=_asked(task, algorithm, spec) | ({OUTPUT_DIR: output_dir} if output_dir else {}),
            spelled={place: one.spelling for place, one in said.items()},
            task_type=task.name,
            output_dir=output_dir,
            folder=task.folder,
        )

    def _one_of(self, key: str, known: Mapping[str, Any]) -> str:
        """The value of a key that all else hangs on. Raises ValidationError."""
        value = self._written.get(key)
        if isinstance(value, str) and value in known:
            return value
        listed = ", ".join(known)
        near = near_name(value, known) if isinstance(value, str) else ""
        self._fault(key, f"has to be one of {listed}, not {str(value)[:60]!r}{near}")
        raise refusal(self._faults, self._name)

    def _algorithm(self, task: Task) -> str:
        if self._written.get(ALGORITHM) is None:
            return next(iter(task.algorithms))
        if task.has_algorithms:
            return self._one_of(ALGORITHM, task.algorithms)
        self._fault(ALGORITHM, f"means nothing to task_type {task.name}; rl has algorithms")
        return ANY

    def _said(self, task: Task, algorithm: str) -> Said:
        """What is unknown, said twice, or no value of its key is noted as a fault."""
        known = {word: key for key in task.reads(algorithm) for word in key.spellings}
        said: Said = {}
        for word, written in self._written.items():
            if word in {TASK_TYPE, ALGORITHM}:
                continue
            if word not in known:
                self._fault(word, self._unknown(word, task, known))
                continue
            try:
                value = None if written is None else known[word].read(written)
            except ValueError as error:
                self._fault(word, str(error))
                continue
            self._add(said, known[word].place, _Said(word, value))
        return said

    def _add(self, said: Said, place: str, one: _Said) -> None:
        if one.value is None:
            return
        if place in said:
            other = said[place].spelling
            self._fault(one.spelling, f"says again what {other} says; keep one of them")
        else:
            said[place] = one

    def _unknown(self, word: str, task: Task, known: Mapping[str, Key]) -> str:
        elsewhere = [key for key in KEYS if word in key.spellings]
        for key in elsewhere:
            if told := task.refusal(key):
                return f"means nothing to task_type {task.name}: {told}"
        if not elsewhere:
            meant = [*known, *[ALGORITHM][: task.has_algorithms]]
            near = near_name(word[:_LONGEST], meant) if len(self._faults) < MAX_FAULTS else ""
            return f"unknown key{near}"
        algorithms = [name for name in task.algorithms if _reads(task, name, word)]
        if algorithms:
            return f"means nothing to this algorithm; it is for {_listed(algorithms)}"
        tasks = [other.name for other in TASKS.values() if _reads(other, None, word)]
        return f"means nothing to task_type {task.name}; it is for {_listed(tasks)}"

    def _check_adapters(self, task: Task, said: Said) -> None:
        """Without adapters nothing may be said of them."""
        if _LORA not in said or said[_LORA].value is not False:
            return
        if task.defaults.get(_LORA, False) is not None:
            self._fault(said[_LORA].spelling, "task_type: sft is the one that trains every weight")
        for one in _of_adapters(said):
            self._fault(one.spelling, f"means nothing with {said[_LORA].spelling}: false")

    def _spec(self, task: Task, algorithm: str, said: Said) -> AnySpec | None:
        """None where there are faults."""
        kind, values = task.algorithms[algorithm], _values(task, said)
        try:
            spec = kind.model_validate(values)
            if GLOBAL_BATCH not in said:
                return spec
            shares = self._shares(spec, said)
            for place, value in shares.items():
                put(values, place, value)
            return kind.model_validate(values)
        except PydanticError as error:
            found: dict[str, list[str]] = {}
            for place, message in faults_of(error):
                told = _in_its_words(message, task, algorithm, said)
                found.setdefault(_spelling(task, algorithm, said, place), []).append(told)
            for key, messages in found.items():
                self._fault(key, "; or ".join(messages))
        return None

    def _output_dir(self, said: Said) -> str | None:
        if OUTPUT_DIR not in said:
            return None
        try:
            return _NAME.validate_python(said[OUTPUT_DIR].value)
        except PydanticError:
            self._fault(said[OUTPUT_DIR].spelling, "has to be the path of a folder")
        return None

    def _shares(self, spec: AnySpec, said: Said) -> dict[str, int]:
        try:
            return share_out(_COUNT.validate_python(said[GLOBAL_BATCH].value), spec, said)
        except PydanticError:
            message = "has to be a whole number"
        except ValueError as error:
            message = str(error)
        self._fault(said[GLOBAL_BATCH].spelling, message)
        return {}

    def _fault(self, key: str, message: str) -> None:
        self._faults.append(Fault(message, key, self._lines.get((key,))))


def _asked(task: Task, algorithm: str, spec: AnySpec) -> dict[str, Any]:
    """Under the keys' first names."""
    body, told = spec.model_dump(mode="json"), {TASK_TYPE: task.name}
    if task.has_algorithms:
        told[ALGORITHM] = algorithm
    keys = [key for key in task.reads(algorithm) if not key.is_shorthand]
    values = {key.name: at(body, key.place) for key in keys}
    return told | {name: value for name, value in values.items() if value is not None}


def _values(task: Task, said: Said) -> dict[str, Any]:
    """As the specification is made from."""
    values: dict[str, Any] = {}
    for place, value in task.defaults.items():
        if place == HOLDOUT and _EVALUATION in said:
            continue
        put(values, place, dict(value) if isinstance(value, dict) else value)
    is_full, adapters = _LORA in said and said[_LORA].value is False, _of_adapters(said)
    if not is_full and (_LORA in said or adapters):
        values[_LORA] = values.get(_LORA) or {}
    for place, one in said.items():
        is_out = place in {OUTPUT_DIR, GLOBAL_BATCH, _LORA} or (is_full and one in adapters)
        if not is_out:
            put(values, place, one.value)
    return values


def _of_adapters(said: Said) -> list[_Said]:
    return [
        one for place, one in said.items() if place.startswith("lora.") or place == _QUANTIZATION
    ]


def _spelling(task: Task, algorithm: str, said: Said, place: str) -> str:
    """The key by which a place is known to who wrote the file."""
    parts = place.split(".")
    for length in range(len(parts), 0, -1):
        outer = ".".join(parts[:length])
        if outer in said:
            return said[outer].spelling
        for key in task.reads(algorithm):
            if key.place == outer and not key.is_shorthand:
                return key.name
    return ""


def _in_its_words(message: str, task: Task, algorithm: str, said: Said) -> str:
    for key in task.reads(algorithm):
        if "." in key.place and key.place in message:
            message = message.replace(key.place, _spelling(task, algorithm, said, key.place))
    return message


def _reads(task: Task, algorithm: str | None, word: str) -> bool:
    return any(word in key.spellings for key in task.reads(algorithm))


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))

"""Rows that name adapters of their own: which rows train which, side by side over one base."""

from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tunesmith.data import row_adapters
from tunesmith.data.holdout import Rows
from tunesmith.data.row import RowAdapter
from tunesmith.data.rows import RowFault
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.folder import listed
from tunesmith.nn.opening import linear_layers
from tunesmith.spec.pipe import TrainerTask
from tunesmith.spec.sweep import MAX_TRIALS
from tunesmith.spec.train import Lora, Sft
from tunesmith.train.sets import open_sets
from tunesmith.train.trial import Configuration

OWN = "configured"
"""The adapter of the rows that name none."""
_BLOCK = 1 << 20


def by_rows(task: TrainerTask, spec: Sft) -> list[Configuration]:
    """One for each distinct adapter that the rows name; empty where they name none.

    Raises JobFailure(data_error) with the line of what is wrong.
    """
    path = Path(task.inputs.dataset)
    if spec.lora is None or not _may_name(path, [b"target_modules", b"rank"][: 1 + spec.row_ranks]):
        return []
    with ExitStack() as files:
        rows, _ = open_sets(task.inputs, spec, files)
        try:
            places = _grouped(rows, spec.lora)
            if places.keys() <= {None}:
                return []
            _refuse_unknown(task, rows, places)
        except RowFault as fault:
            raise JobFailure(FailureClass.DATA_ERROR, fault.message) from fault
    if spec.sweep is not None or spec.run.devices > 1:
        raise JobFailure(
            FailureClass.USER_ERROR,
            f"{path.name}: its rows name adapters of their own, which goes with no sweep and with "
            "one device only",
            "take target_modules and rank out of the rows, or leave sweep and devices out",
        )
    return [
        _configuration(spec, number, adapter, found)
        for number, (adapter, found) in enumerate(places.items())
    ]


def _may_name(path: Path, marks: list[bytes]) -> bool:
    """By the bytes of the file, read once: most files name nothing."""
    longest = max(map(len, marks))
    end = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if any(mark in end + block for mark in marks):
                return True
            end = block[-longest:]
    return False


def _grouped(rows: Rows, lora: Lora) -> dict[RowAdapter | None, "array[int]"]:
    """Places by adapter, those of the configuration's own first; None is the configuration's."""
    found: dict[RowAdapter | None, array[int]] = {None: array("Q")}
    for place in range(len(rows)):
        row = rows[place]
        adapter = None if row.adapter is None else _whole(row.adapter, lora)
        found.setdefault(adapter, array("Q")).append(place)
        if len(found) > MAX_TRIALS:
            raise RowFault(
                row.line,
                f"this is the adapter number {MAX_TRIALS} that the rows name; at most "
                f"{MAX_TRIALS - 1} are trained beside the configuration's own",
                loc=row_adapters.TARGETS,
            )
    return {adapter: places for adapter, places in found.items() if places}


def _whole(named: RowAdapter, lora: Lora) -> RowAdapter | None:
    """With what it leaves to the configuration; None where that is all of it."""
    targets = named.targets if named.targets is not None else _sorted(lora.targets)
    if targets == (row_adapters.ALL_LINEAR,):
        targets = None
    rank = named.rank or lora.rank
    is_own = targets == _sorted(lora.targets) and rank == lora.rank
    return None if is_own else RowAdapter(targets, rank)


def _sorted(targets: str | tuple[str, ...]) -> tuple[str, ...] | None:
    """None is all linear layers."""
    return None if isinstance(targets, str) else tuple(sorted(set(targets)))


def _refuse_unknown(
    task: TrainerTask, rows: Rows, places: dict[RowAdapter | None, "array[int]"]
) -> None:
    known = linear_layers(task.inputs.model)
    for adapter, found in places.items():
        for target in (adapter.targets if adapter else None) or ():
            if not any(name == target or name.endswith(f".{target}") for name in known):
                names = listed(name.rsplit(".", 1)[-1] for name in known)
                raise RowFault(
                    rows[found[0]].line,
                    f"the model has no linear layer {target!r}; it has {names}",
                    loc=row_adapters.TARGETS,
                )


def _configuration(
    spec: Sft, number: int, adapter: RowAdapter | None, places: "array[int]"
) -> Configuration:
    if adapter is None:
        return Configuration(OWN, spec, {}, places)
    assert spec.lora is not None
    settings: dict[str, Any] = {
        "rank": adapter.rank,
        "targets": row_adapters.ALL_LINEAR if adapter.targets is None else adapter.targets,
    }
    lora = spec.lora.model_copy(update=settings)
    own = spec.model_copy(update={"lora": lora})
    return Configuration(f"adapter-{max(number, 1)}", own, settings, places)

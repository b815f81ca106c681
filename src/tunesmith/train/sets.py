"""The rows that are trained on, and those that are kept back to be evaluated."""

from contextlib import ExitStack
from pathlib import Path

from tunesmith.data.holdout import Rows, hold_out
from tunesmith.data.reading import Reading
from tunesmith.data.rows import RowFault, RowIndex
from tunesmith.data.sampling import choose
from tunesmith.data.suited import refuse_unpaired, refuse_unsuited
from tunesmith.errors import FailureClass, JobFailure, ValidationError
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.sampling import Sampling
from tunesmith.spec.train import AnySpec, Pretrain, reward_training


def open_sets(inputs: Inputs, spec: AnySpec, files: ExitStack) -> tuple[Rows, Rows | None]:
    """None where nothing is evaluated. Raises JobFailure(data_error)."""
    rows = files.enter_context(open_rows(inputs.dataset, spec))
    if isinstance(spec, Pretrain) and spec.sampling is not None:
        return _sampled(rows, spec, spec.sampling, inputs, files)
    if inputs.eval_dataset is not None:
        return rows, files.enter_context(open_rows(inputs.eval_dataset, spec))
    if not spec.holdout:
        return rows, None
    try:
        return hold_out(rows, spec.holdout, spec.optim.seed)
    except ValidationError as error:
        raise JobFailure(FailureClass.DATA_ERROR, error.message) from error


def _sampled(
    rows: RowIndex, spec: Pretrain, sampling: Sampling, inputs: Inputs, files: ExitStack
) -> tuple[Rows, Rows | None]:
    """What is held out is of those that are chosen."""
    try:
        chosen = choose(rows, sampling)
        if inputs.eval_dataset is not None:
            return chosen, files.enter_context(open_rows(inputs.eval_dataset, spec))
        if not spec.holdout:
            return chosen, None
        rest, held_out = hold_out(chosen, spec.holdout, spec.optim.seed)
        return chosen.within(rest.places), held_out
    except ValidationError as error:
        raise JobFailure(FailureClass.DATA_ERROR, error.message) from error


def open_rows(path: str, spec: AnySpec) -> RowIndex:
    """Raises JobFailure(data_error) that names the line, or the format that the method reads."""
    try:
        rows = RowIndex.open(Path(path), Reading.of(spec))
    except RowFault as fault:
        raise JobFailure(FailureClass.DATA_ERROR, fault.message) from fault
    if not len(rows):
        raise JobFailure(FailureClass.DATA_ERROR, f"{Path(path).name} holds no row")
    try:
        refuse_unsuited(spec.method, rows.format, Path(path).name)
        if reward_training(spec) is not None:
            refuse_unpaired(rows.format, Path(path).name)
    except ValidationError as error:
        raise JobFailure(FailureClass.DATA_ERROR, error.message) from error
    return rows

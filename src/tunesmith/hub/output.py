"""Where a job may put its model: refused at submit, not after hours of training."""

from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import BadRequestError, ConflictError
from tunesmith.hub.folder import ModelFolder
from tunesmith.manifest import MANIFEST
from tunesmith.store.files import confine
from tunesmith.store.promotion import check_output

if TYPE_CHECKING:
    from tunesmith.hub import Hub
    from tunesmith.hub.asked import Request

MAX_PART_BYTES = 200
"""Of one folder's name: names beside it are made from it."""
MAX_PARTS = 32
MAX_BYTES = 1024
"""Of the whole path: what is put inside must have room."""
_OURS = ("outputs", "outputs/training_logs", "logs", "data", "datasets")
_MARKS = ("config.json", "adapter_config.json", MANIFEST)


def find(hub: "Hub", asked: "Request", model: ModelFolder) -> str:
    """The absolute path of `output_dir`. Raises BadRequestError, ConflictError."""
    field = asked.name("output_dir")
    path = confine(asked.output_dir or "", hub.workspace, hub.settings.allowed_roots, field)
    _refuse_shape(path, field)
    _refuse_ours(hub, path, field)
    _refuse_inside(hub, path, field)
    check_output(path)
    _refuse_self(path, model, getattr(asked.spec, "lora", None) is not None, field)
    return str(path)


def _refuse_shape(path: Path, field: str) -> None:
    parts = [len(part.encode("utf-8", "replace")) for part in path.parts]
    if max(parts) > MAX_PART_BYTES or len(parts) > MAX_PARTS or sum(parts) > MAX_BYTES:
        raise BadRequestError(
            f"{field}: at most {MAX_PARTS} folders deep, {MAX_PART_BYTES} bytes a name and "
            f"{MAX_BYTES} in all",
            param=field,
        )


def _refuse_ours(hub: "Hub", path: Path, field: str) -> None:
    """Folders that hold more than one model, and those that logs go to."""
    shared = {hub.workspace / name for name in _OURS}
    logs = (hub.workspace / "outputs" / "training_logs", hub.workspace / "logs")
    if path in shared or hub.workspace.is_relative_to(path) or _is_inside(path, logs):
        raise ConflictError(
            f"{field}: {path.name} is not for one model alone; choose a folder in it, such as "
            "outputs/my_model",
            param=field,
        )


def _is_inside(path: Path, folders: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _refuse_inside(hub: "Hub", path: Path, field: str) -> None:
    """A file on the way, or a model's own folder."""
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise BadRequestError(f"{field}: {parent.name} is a file, not a folder", param=field)
        if parent == hub.workspace:
            return
        if any((parent / mark).exists() for mark in _MARKS):
            raise ConflictError(
                f"{field}: {parent.name} is the folder of a model; choose one beside it",
                param=field,
            )


def _refuse_self(path: Path, model: ModelFolder, is_adapter: bool, field: str) -> None:
    """New adapters would take the place of the very weights that they stand on."""
    base = model.base.resolve()
    if is_adapter and base.is_relative_to(path):
        raise ConflictError(
            f"{field}: the adapters stand on the model in {path.name}, which must stay; choose "
            "another folder",
            param=field,
        )

"""Everything a training needs to go on as if nothing had happened, in one sealed folder.

step-<n>/model/                what transformers or PEFT loads, with the tokenizer: can be served
         optimizer.safetensors
         random.safetensors
         kept.safetensors      what the method measured before the first update, if anything
         state.json            step, data position, counts, plan
         manifest.json
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith import manifest
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import KNOWN, Checkpointed
from tunesmith.train.failure import is_disk_full

KIND = "checkpoint"
_OPTIMIZER, _RANDOM, _KEPT, _STATE, _MODEL = (
    "optimizer.safetensors",
    "random.safetensors",
    "kept.safetensors",
    "state.json",
    "model",
)


@dataclass(frozen=True)
class Snapshot:
    """What is written. `save_model` writes weights and tokenizer into the folder it is given."""

    step: int
    save_model: Callable[[Path], None]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    state: dict[str, Any]
    kept: Mapping[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """What is read back."""

    folder: Path
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]
    kept: dict[str, Tensor]
    part: str = ""
    """The folder of its weights inside `model/`, where there are several trainings' in it."""

    def weights(self) -> dict[str, Tensor]:
        return load_weights(self.folder / _MODEL / self.part)

    def of(self, name: str, part: str) -> "Saved":
        """What was kept of one training of several: see `joined`."""
        optimizer, random, kept = (
            {
                key[len(name) + 1 :]: one
                for key, one in tensors.items()
                if key.startswith(f"{name}/")
            }
            for tensors in (self.optimizer, self.random, self.kept)
        )
        return Saved(self.folder, optimizer, random, self.state["trials"][name], kept, part)


def joined(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Those of several trainings as one, under `<training>/<name>`."""
    return {f"{owner}/{name}": one for owner, held in tensors.items() for name, one in held.items()}


class Shelf:
    """The checkpoints of one attempt: `<attempt>/checkpoints`."""

    def __init__(self, attempt_dir: Path, keep: int) -> None:
        self.folder = attempt_dir / "checkpoints"
        self._known = attempt_dir / KNOWN
        self._keep = keep
        for left in self.folder.glob(".step-*.part"):
            shutil.rmtree(left, ignore_errors=True)

    def write(self, snapshot: Snapshot) -> Checkpointed:
        """Stage, seal, rename. `thin` comes after the word of it, so that one told of is there.

        On a full disk all but the newest are let go first, and it is tried once more. Raises
        whatever the disk says, with at least the newest checkpoint and no staging folder left.
        """
        final = self.folder / f"step-{snapshot.step}"
        try:
            digest = self._commit(snapshot, final)
        except Exception as error:
            if not is_disk_full(error) or not self.thin(1):
                raise
            digest = self._commit(snapshot, final)
        return Checkpointed(
            step=snapshot.step,
            path=str(final.absolute()),
            manifest_sha256=digest,
            size_bytes=sum(path.stat().st_size for path in final.rglob("*") if path.is_file()),
        )

    def thin(self, keep: int | None = None) -> bool:
        """Let go of all but the newest `keep`, or as many as are wanted, and the newest that the
        worker says the API knows. Whether there was something to let go of."""
        held = sorted(self.folder.glob("step-*"), key=_step_of)
        known = self._known.read_text("ascii") if self._known.exists() else ""
        old = [path for path in held[: -(keep or self._keep)] if path.name != known]
        for path in old:
            manifest.remove(path)
        return bool(old)

    def _commit(self, snapshot: Snapshot, final: Path) -> str:
        """Returns the manifest's digest. One of the same step gives way once this one is whole."""
        staging = self.folder / f".step-{snapshot.step}.part"
        try:
            (staging / _MODEL).mkdir(parents=True)
            _fill(staging, snapshot)
            digest = manifest.seal(staging, KIND, {"step": snapshot.step})
            if final.exists():
                manifest.remove(final)
            os.rename(staging, final)
            manifest.fsync_folder(final.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return digest


def read(folder: Path) -> Saved:
    """A checkpoint whose every byte is as it was sealed. Raises JobFailure(checkpoint_corrupt)."""
    try:
        manifest.verify(folder)
        return Saved(
            folder=folder,
            optimizer=load_file(folder / _OPTIMIZER),
            random=load_file(folder / _RANDOM),
            state=json.loads((folder / _STATE).read_bytes()),
            kept=load_file(folder / _KEPT) if (folder / _KEPT).exists() else {},
        )
    except manifest.BrokenManifest as broken:
        raise _corrupt(str(broken)) from broken
    except (OSError, ValueError, SafetensorError) as error:
        raise _corrupt(f"{folder.name}: {error}") from error


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's or an adapter's folder, under the names they have there."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def _fill(staging: Path, snapshot: Snapshot) -> None:
    snapshot.save_model(staging / _MODEL)
    save_file(_plain(snapshot.optimizer), staging / _OPTIMIZER)
    save_file(_plain(snapshot.random), staging / _RANDOM)
    if snapshot.kept:
        save_file(_plain(snapshot.kept), staging / _KEPT)
    body = json.dumps(snapshot.state, allow_nan=False, sort_keys=True)
    (staging / _STATE).write_text(body, encoding="utf-8")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _corrupt(message: str) -> JobFailure:
    return JobFailure(
        FailureClass.CHECKPOINT_CORRUPT,
        f"the checkpoint cannot be used: {message}",
        "start again from an older checkpoint, or without one",
    )

"""Stages of a long training: models as they were on the way, which stay and go into the result.

`<attempt>/stages/step-<n>` is a model's folder, whole from the moment that it has its name. It is
made of links to the files of the checkpoint of that step, so that it costs no second write.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith import manifest
from tunesmith.spec.pipe import STAGES
from tunesmith.train.artifact import RECORD

_MODEL = "model"


class Stages:
    """The newest `keep` of them, one every so many steps. `record` is of the training."""

    def __init__(self, attempt_dir: Path, every: int, keep: int, record: Mapping[str, Any]) -> None:
        self.folder = attempt_dir / STAGES
        self._every, self._keep, self._record = every, keep, dict(record)
        for left in self.folder.glob(".step-*.part"):
            shutil.rmtree(left, ignore_errors=True)

    def adopt(self, checkpoint: Path, step: int) -> None:
        """On a resume: those of the attempt that the checkpoint is of, and its own. Who names a
        checkpoint may have made the folders beside it: what leads elsewhere is left."""
        for number, stage in _found(checkpoint.parents[1] / STAGES):
            if number <= step and not _has_link(stage):
                self._add(stage, number)
        self.add(checkpoint, step)

    def add(self, checkpoint: Path, step: int) -> None:
        """Of a sealed checkpoint, where a stage is due at its step."""
        if step and step % self._every == 0:
            self._add(checkpoint / _MODEL, step)
        for _, stage in list(_found(self.folder))[: -self._keep]:
            shutil.rmtree(stage, ignore_errors=True)

    def place(self, folder: Path) -> None:
        """Link them into a result's folder."""
        for _, stage in _found(self.folder):
            _link_tree(stage, folder / stage.name)

    def _add(self, model: Path, step: int) -> None:
        final, staging = self.folder / f"step-{step}", self.folder / f".step-{step}.part"
        if final.exists():
            return
        try:
            _link_tree(model, staging)
            if not (staging / RECORD).exists():
                body = json.dumps({**self._record, "step": step}, ensure_ascii=False, indent=1)
                manifest.write_durably(staging / RECORD, body.encode() + b"\n")
            manifest.fsync_folder(staging)
            os.rename(staging, final)
            manifest.fsync_folder(self.folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _found(folder: Path) -> Iterator[tuple[int, Path]]:
    """By step."""
    places = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*")]
    yield from sorted((int(number), path) for number, path in places if number.isdecimal())


def _has_link(folder: Path) -> bool:
    return any(path.is_symlink() for path in (folder.parent, folder, *folder.rglob("*")))


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or too many names of one file
        shutil.copyfile(source, target)

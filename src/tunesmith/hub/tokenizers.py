"""A tokenizer that a training brings along: found in the workspace, packed, pinned by content."""

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data import brought
from tunesmith.data.render import Renderer
from tunesmith.data.tokens import TokenizerFault
from tunesmith.errors import NotFoundError, ValidationError
from tunesmith.hub.data import named
from tunesmith.hub.folder import ModelFolder
from tunesmith.spec.records import Source
from tunesmith.spec.train import Pretrain, TrainSpec
from tunesmith.store.files import confine

if TYPE_CHECKING:
    from tunesmith.hub import Hub


def of(spec: TrainSpec) -> str | None:
    """Its name, where the training brings one."""
    return spec.tokenizer if isinstance(spec, Pretrain) else None


def find(hub: "Hub", name: str, field: str) -> Path:
    """Raises NotFoundError, BadRequestError where it leaves the workspace."""
    path = confine(name, hub.workspace, hub.settings.allowed_roots, field)
    if not path.exists():
        raise NotFoundError(f"{field}: nothing lies at {name!r} in the workspace", param=field)
    return path


def pin(hub: "Hub", name: str, field: str) -> Source:
    """Raises NotFoundError, BadRequestError (it leaves the workspace), ValidationError."""
    try:
        packed = brought.pack(find(hub, name, field), name)
    except TokenizerFault as fault:
        raise ValidationError(f"{field}: {fault.message}", param=field) from None
    with hub.blobs.receive(brought.MAX_BYTES) as incoming:
        incoming.write(packed)
        blob = incoming.commit()
    place = named(hub, blob.sha256, brought.SUFFIX)
    os.utime(place)
    return Source(name=name, path=str(place), sha256=blob.sha256)


def refuse_larger(pinned: Source, spec: TrainSpec, model: ModelFolder, field: str) -> None:
    """Raises ValidationError where the model has no place for all of its tokens."""
    size, room = renderer(pinned).vocabulary_size, model.size("vocab_size")
    is_new = isinstance(spec, Pretrain) and spec.from_scratch
    try:
        brought.refuse_larger(size, room, pinned.name, is_new=is_new)
    except TokenizerFault as fault:
        raise ValidationError(f"{field}: {fault.message}", param=field) from None


def renderer(pinned: Source) -> Renderer:
    return _renderer(pinned.path)


@lru_cache(maxsize=8)
def _renderer(path: str) -> Renderer:
    """A path that is named by its content."""
    return brought.renderer(Path(path))

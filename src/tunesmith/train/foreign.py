"""A model with a tokenizer that is not its own: unpacked, checked, named in what is made."""

import json
from pathlib import Path
from typing import Any

from tunesmith.data import brought
from tunesmith.data.render import Renderer
from tunesmith.errors import FailureClass, JobFailure, ValidationError
from tunesmith.nn.language import Model
from tunesmith.spec.pipe import TrainerTask
from tunesmith.spec.train import AnySpec, Pretrain

_CONFIGS = ("config.json", "generation_config.json")


def load(task: TrainerTask) -> Renderer:
    """Raises JobFailure(user_error)."""
    assert task.inputs.tokenizer is not None
    try:
        folder = Path(task.attempt_dir) / "tokenizer"
        return Renderer.load(brought.unpack(Path(task.inputs.tokenizer), folder))
    except ValidationError as error:
        raise JobFailure(FailureClass.USER_ERROR, error.message) from error


def refuse_larger(renderer: Renderer, model: Model, spec: AnySpec) -> None:
    """Raises JobFailure(user_error) where the embedding has no row for each token."""
    assert isinstance(spec, Pretrain)
    size, room = renderer.vocabulary_size, model.vocabulary_size
    try:
        brought.refuse_larger(size, room, f"tokenizer {spec.tokenizer}", is_new=spec.from_scratch)
    except ValidationError as error:
        raise JobFailure(FailureClass.USER_ERROR, error.message) from error


def name_ends(folder: Path, renderer: Renderer) -> None:
    """Have a saved model's configurations name the tokenizer's ids for the ends of a text."""
    ids = {
        "bos_token_id": renderer.bos_token_id,
        "eos_token_id": renderer.eos_token_id,
        "pad_token_id": renderer.pad_token_id,
    }
    for place in (folder / name for name in _CONFIGS):
        if place.is_file():
            config: dict[str, Any] = json.loads(place.read_bytes())
            body = json.dumps({**config, **ids}, indent=2, sort_keys=True)
            place.write_text(body + "\n", encoding="utf-8")

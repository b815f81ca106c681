"""What an adapter calls its base, where the base has another path than the trainer's."""

import json
from collections.abc import Mapping
from pathlib import Path

_CONFIG, _BASE = "adapter_config.json", "base_model_name_or_path"


def name_base(folder: Path, named: Mapping[str, str]) -> None:
    """Write the published name into a saved adapter's configuration, which reads as PEFT wrote it.

    `named` holds published names by path; a folder that is no adapter's is left alone.
    """
    place = folder / _CONFIG
    if not named or not place.is_file():
        return
    config = json.loads(place.read_bytes())
    published = named.get(str(config.get(_BASE)))
    if published is not None:
        config[_BASE] = published
        place.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def place_base(folder: Path, named: Mapping[str, str]) -> None:
    """The way back: the path here, instead of a published name."""
    name_base(folder, {published: path for path, published in named.items()})

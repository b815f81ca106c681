"""What a validation set shares with its training set: found once for each pair of contents."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data import alike
from tunesmith.data.reading import Reading
from tunesmith.data.twins import Twins
from tunesmith.spec.records import Source
from tunesmith.store import catalog

if TYPE_CHECKING:
    from tunesmith.hub import Hub


def key(training: Source, validation: Source, reading: Reading) -> str:
    """Kept data sets are named by their digest and kind."""
    return f"overlap:{Path(training.path).name}:{Path(validation.path).name}{reading.key}"


def kept(hub: "Hub", place: str) -> Twins | None:
    """What was found before under that key."""
    body = hub.store.read(lambda tx: catalog.find_verdict(tx, place))
    return None if body is None else Twins.model_validate(body)


def find(hub: "Hub", training: Source, validation: Source, reading: Reading) -> Twins:
    """Kept, or found now and kept. Reads both files."""
    place = key(training, validation, reading)
    found = kept(hub, place)
    if found is None:
        found = alike.overlap(Path(training.path), Path(validation.path), reading)
        body = found.model_dump(mode="json")
        hub.store.write(partial(catalog.keep_verdict, key=place, verdict=body)).result()
    return found

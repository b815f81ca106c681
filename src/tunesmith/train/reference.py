"""What the model said before it was trained, measured once over the data, before the first update.

So no second copy of the model is held, and later epochs pay nothing. The numbers go into every
checkpoint under a key of all that decides them; where the key is another, they are measured anew,
in the same passes, and come out the same to the last bit on a CPU. N samples of a step.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.nn.folder import open_folder
from tunesmith.spec.pipe import TrainerTask
from tunesmith.train.batches import Feed, Interrupted, S
from tunesmith.train.parallel import Group

_LOGPS, _PARTNERS, _KEY = "logps", "partners", "key"


class Reference:
    """By a sample's place in its source: two log-probabilities, and maybe another's place."""

    def __init__(self, places: int, key: str) -> None:
        self.logps_N2 = torch.full((places, 2), torch.nan)
        """Not a number where nothing was measured."""
        self.partners_N = torch.full((places,), -1, dtype=torch.int32)
        self._key = torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)

    def at(self, places_N: Tensor, device: str) -> Tensor:
        """(N, 2), each of which was measured."""
        found_N2 = self.logps_N2[places_N]
        assert not found_N2.isnan().any(), "a sample that the walk did not come to"
        return found_N2.to(device)

    def put(self, places_N: Tensor, logps_N2: Tensor, group: Group) -> None:
        """What this process measured of a step; the rest is not a number. Shared with all."""
        known_N2 = logps_N2.double().nan_to_num(0.0)
        numbers = group.add_up(*known_N2.flatten().tolist())
        self.logps_N2[places_N] = torch.tensor(numbers, dtype=torch.float64).view(-1, 2).float()

    def kept(self, prefix: str) -> dict[str, Tensor]:
        tensors = {_LOGPS: self.logps_N2, _PARTNERS: self.partners_N, _KEY: self._key}
        return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}

    def restore(self, kept: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether `kept` holds numbers of this very key, which are then taken."""
        key = kept.get(f"{prefix}/{_KEY}")
        if key is None or not torch.equal(key, self._key):
            return False
        self.logps_N2 = kept[f"{prefix}/{_LOGPS}"]
        self.partners_N = kept[f"{prefix}/{_PARTNERS}"]
        return True


def walk(
    feed: Feed[S], steps: int, should_stop: Callable[[], bool], tell: Callable[[int, int], None]
) -> Iterator[Sequence[S]]:
    """The samples of the first epoch's steps, at most so many. Raises Interrupted at a stop."""
    for step in range(steps):
        if should_stop():
            raise Interrupted
        yield feed.take()
        tell(step + 1, steps)
        if feed.epoch:
            return


def key_of(task: TrainerTask, dataset: str, detail: Mapping[str, Any]) -> str:
    """SHA-256 of the data, of the weights as they are opened, and of what else decides."""
    folder = open_folder(task.inputs.model)
    places = [place for place in (folder.base, folder.adapter) if place is not None]
    digest = hashlib.sha256(json.dumps(detail, sort_keys=True).encode())
    for path in [Path(dataset), *(one for place in places for one in _weights(place))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])

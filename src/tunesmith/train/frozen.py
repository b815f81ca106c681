"""The model as it was opened, without a second one.

A copy of what is trained, be it all weights or an adapter, changes places with the present weights
while it is asked. For an adapter that is small; a new one's output is that of the bare base.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.nn.language import Model


class Frozen:
    def __init__(self, model: Model) -> None:
        """To be made before the first update, and before a checkpoint is gone on from."""
        self._trained = list(model.trainable().values())
        self._held = [one.detach().clone() for one in self._trained]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The model is as it was opened within this."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for place, one in enumerate(self._trained):
            one.data, self._held[place] = self._held[place], one.data

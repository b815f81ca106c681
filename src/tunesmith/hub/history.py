"""How fast the newest jobs ran here: what the next ones are foretold from."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.errors import TuningAPIError
from tunesmith.hub.estimate import Ran, flops_a_token
from tunesmith.hub.folder import read
from tunesmith.spec.records import Job, JobState
from tunesmith.store import jobs
from tunesmith.store.database import Store

NEWEST = 20
KEEP_SECONDS = 60.0


class History:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: tuple[float, Sequence[Ran]] | None = None

    def fresh(self) -> Sequence[Ran] | None:
        """What was looked up not long ago."""
        if self._known is None or time.monotonic() - self._known[0] > KEEP_SECONDS:
            return None
        return self._known[1]

    def recent(self) -> Sequence[Ran]:
        """Of finished jobs whose models are still there. Blocks on the database and on files."""
        found = self.fresh()
        if found is None:
            ended = self._store.read(
                lambda tx: jobs.list_jobs(tx, states=[JobState.SUCCEEDED], limit=NEWEST)
            )
            found = list(_ran(ended))
            self._known = (time.monotonic(), found)
        return found


def _ran(ended: Sequence[Job]) -> Iterator[Ran]:
    for job in ended:
        speed = job.metrics.get("tokens_per_second")
        if job.plan is None or not isinstance(speed, int | float):
            continue
        try:
            folder = read(Path(job.model.path))
        except TuningAPIError:
            continue
        yield Ran(job.plan.device != "cpu", speed * flops_a_token(job.spec, folder))

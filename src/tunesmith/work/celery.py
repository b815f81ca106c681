"""Celery's side of the bell: `celery -A tunesmith.work.celery worker` on every host that trains.

The Celery worker keeps the host's one Tunesmith worker alive, for as long as it runs itself. Its
only task rings that worker, which then asks the API for work: a message carries no job, and a lost
or repeated one neither loses nor doubles any. Settings come from the environment; on a host that
does not see the workspace: TUNESMITH_BASE_URL and TUNESMITH_WORKER_TOKEN.
"""

import contextlib
import os
from typing import Any

from celery import bootsteps, signals

from tunesmith.settings import Settings
from tunesmith.work import worker
from tunesmith.work.keeper import Keeper
from tunesmith.work.rings import RING, hearer

COLD_SECONDS = 5.0
"""For trainers, where Celery was told twice to stop."""
_settings = Settings.read(bell="celery")
app = hearer(_settings.redis_url)


@app.task(name=RING, ignore_result=True, acks_late=False)  # type: ignore[untyped-decorator]
def ring() -> None:
    """Tell this host's worker to ask now. Does nothing where none runs: it asks when it starts."""
    pid = worker.running_pid(_settings)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, worker.RING_SIGNAL)


class HostsWorker(bootsteps.StartStopStep):  # type: ignore[misc]
    """The Tunesmith worker runs from before the broker is reached until Celery stops."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        self._keeper = Keeper(_settings)
        signals.worker_shutdown.connect(self._on_shutdown)
        super().__init__(parent, **options)

    def start(self, parent: Any) -> None:
        self._keeper.start()

    def stop(self, parent: Any) -> None:
        self._keeper.stop()

    def terminate(self, parent: Any) -> None:
        self._keeper.stop(COLD_SECONDS)

    def _on_shutdown(self, **_: Any) -> None:
        """Also where Celery leaves before it has quite started."""
        self._keeper.stop()


app.steps["worker"].add(HostsWorker)

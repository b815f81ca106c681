"""The bell: after a commit that may have made a job claimable, idle workers are told to ask.

A ring that fails is a line in the log: workers ask by themselves as well, only later.
"""

import logging
import threading
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from tunesmith.errors import BadRequestError
from tunesmith.settings import Settings

log = logging.getLogger(__name__)

TOPICS = frozenset({"queue", "engines"})
_PACKAGES = {"poll": (), "celery": ("celery", "redis"), "ray": ("ray",)}
PAUSE_SECONDS = 0.05
"""Between two rings: commits in between share one."""


class Rings(Protocol):
    """What carries a ring to the workers."""

    def ring(self) -> None: ...


class Bell:
    """Rings on a thread of its own. At most one ring is owed, however many commits there were."""

    def __init__(self, redis_url: str | None) -> None:
        """Without a broker it is silent: workers poll."""
        self._redis_url = redis_url
        self._owed = threading.Event()
        self._is_closed = False
        self._is_broken = False
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)

    @classmethod
    def of(cls, settings: Settings) -> "Bell":
        """As the settings say. Raises BadRequestError where its package is not installed."""
        for package in _PACKAGES[settings.bell]:
            if find_spec(package) is None:
                raise BadRequestError(
                    f"--bell {settings.bell}: {package} is not installed; "
                    f"pip install 'tunesmith[{settings.bell}]'"
                )
        # Ray's dispatcher looks at the queue by itself.
        return cls(settings.redis_url if settings.bell == "celery" else None)

    def start(self) -> None:
        if self._redis_url is not None:
            self._thread.start()

    def hear(self, topics: frozenset[str]) -> None:
        """Called after each commit, on any thread; never waits."""
        if topics & TOPICS:
            self._owed.set()

    def close(self) -> None:
        """A ring that is under way may still be made."""
        self._is_closed = True
        self._owed.set()

    def _run(self) -> None:
        rings: Rings = import_module("tunesmith.work.rings").Ringer(self._redis_url)
        while True:
            self._owed.wait()
            self._owed.clear()
            if self._is_closed:
                return
            self._ring(rings)
            time.sleep(PAUSE_SECONDS)

    def _ring(self, rings: Rings) -> None:
        try:
            rings.ring()
        except Exception as error:  # whatever a broker may do, a submit must not feel it
            if not self._is_broken:
                log.warning("the bell can't ring, workers ask by themselves: %s", error)
            self._is_broken = True
            return
        if self._is_broken:
            log.info("the bell rings again")
        self._is_broken = False

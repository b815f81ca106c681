"""Hears of other processes' commits on PostgreSQL: a thread with a connection that only listens.

A notification is a hint. While they can't come, everyone who waits is woken each second; and once
after each new connection.
"""

import json
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.store.commits import CHANNEL
from tunesmith.store.tables import ALL

DEAF_SECONDS = 1.0
"""Between two wakings of everyone, while nothing can be heard."""
QUIET_SECONDS = 5.0
"""Without a word, before the connection is asked whether it still lives."""
_log = logging.getLogger(__name__)


class Listener:
    """`tell` is called with topics; `own` is the sender whose words are known here already."""

    def __init__(self, engine: Engine, own: str, tell: Callable[[frozenset[str]], None]) -> None:
        self._engine, self._own, self._tell = engine, own, tell
        self._stopping, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, name="store-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join()
        os.close(self._stopping)
        os.close(self._stop)

    def _run(self) -> None:
        is_open, is_told = True, False
        while is_open:
            began = time.monotonic()
            try:
                is_open = self._listen()
            except (SQLAlchemyError, psycopg.Error, OSError) as error:
                if not is_told:
                    _log.warning("other servers' news can't be heard: %s", error)
                is_told = time.monotonic() - began < QUIET_SECONDS
                self._tell(frozenset({ALL}))
                is_open = not self._is_stopped(DEAF_SECONDS)

    def _listen(self) -> bool:
        """Until the connection breaks (that raises), or the end: False."""
        pooled = self._engine.raw_connection()
        driver: Any = pooled.driver_connection
        pooled.detach()
        try:
            driver.execute(f"LISTEN {CHANNEL}")
            self._tell(frozenset({ALL}))
            while not self._is_stopped(QUIET_SECONDS, driver.fileno()):
                self._hear(driver)
        finally:
            driver.close()
            pooled.invalidate()
        return False

    def _hear(self, driver: "psycopg.Connection[Any]") -> None:
        """What has come; where nothing has, an answer shows that the connection lives."""
        topics = {topic for note in driver.notifies(timeout=0) for topic in self._topics(note)}
        if topics:
            self._tell(frozenset(topics))
        else:
            driver.execute("SELECT 1")

    def _topics(self, note: "psycopg.Notify") -> list[str]:
        try:
            sender, *topics = json.loads(note.payload)
        except (ValueError, TypeError):
            return [ALL]
        return [] if sender == self._own else [str(topic) for topic in topics]

    def _is_stopped(self, seconds: float, *others: int) -> bool:
        """Wait until it is, until one of the others can be read, or for so long."""
        poll = select.poll()
        for descriptor in (self._stopping, *others):
            poll.register(descriptor, select.POLLIN)
        return any(ready == self._stopping for ready, _ in poll.poll(seconds * 1000))

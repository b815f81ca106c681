"""Jobs' events to many readers: each read once from the table and encoded once, shared by all.

A feed is one job's, and lives while someone here follows it. It keeps the newest events in a ring;
a reader further behind pages from the table. A commit's word is a hint: each second all feeds look
whether they missed one.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.api import frames
from tunesmith.api.frames import CHUNK_BYTES, PAGE_EVENTS, Page
from tunesmith.api.stream import Watcher
from tunesmith.errors import AuthenticationError, PermissionError, RateLimitError, TuningAPIError
from tunesmith.store import history
from tunesmith.store.database import Store

RING_EVENTS = 512
RING_BYTES = 1 << 20
ALL_RINGS_BYTES = 16 << 20
PAGES = 64
"""Pages of history that are kept for readers who come one after the other."""
LOOK_SECONDS = 1.0
KEEP_ALIVE_SECONDS = 15.0
FINAL = {"succeeded", "failed", "cancelled"}

log = logging.getLogger(__name__)
T = TypeVar("T")
Door = Callable[[], Awaitable[object]]


class Feeds:
    """All that is followed in this process. Made and used in the server's loop."""

    def __init__(self, store: Store, watcher: Watcher, max_readers_per_key: int) -> None:
        self.store, self.watcher = store, watcher
        self._max_readers = max_readers_per_key
        self._feeds: dict[str, Feed] = {}
        self._readers: Counter[str] = Counter()
        self._pages: OrderedDict[tuple[str, int], asyncio.Task[Page]] = OrderedDict()
        self._paging = asyncio.Semaphore(2)
        self._looking: asyncio.Task[None] | None = None

    def join(self, job_id: str, last_seq: int, key: str, door: Door) -> "Reader":
        """One more reader of a job that has `last_seq` events; see that it leaves.

        `key` is what readers are counted by; `door` raises AuthenticationError once it is no good
        any longer. Raises RateLimitError where too many are open with it.
        """
        if self._readers[key] >= self._max_readers:
            raise RateLimitError(
                f"{self._max_readers} event streams are open with this key, the most there may be; "
                "close one first"
            )
        self._readers[key] += 1
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = Feed(self, job_id, max(0, last_seq - RING_EVENTS))
        reader = Reader(self, feed, key, door)
        feed.add(reader)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_for_ever())
        return reader

    def leave(self, reader: "Reader") -> None:
        self._readers[reader.key] -= 1
        if not self._readers[reader.key]:
            del self._readers[reader.key]
        reader.feed.remove(reader)
        if not reader.feed.readers:
            self._feeds.pop(reader.feed.job_id, None)
        if not self._feeds and self._looking is not None:
            self._looking.cancel()
            self._looking = None

    @property
    def ring_bytes(self) -> int:
        """What each feed may keep."""
        return min(RING_BYTES, ALL_RINGS_BYTES // max(1, len(self._feeds)))

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.to_thread(self.store.read, work)

    async def page(self, job_id: str, seq: int) -> Page:
        """Events after `seq` from the table; whoever asks for the same shares it."""
        key = (job_id, seq)
        task = self._pages.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._pages[key] = asyncio.create_task(self._read_page(job_id, seq))
            if len(self._pages) > PAGES:
                self._pages.popitem(last=False)
        return await asyncio.shield(task)

    async def _read_page(self, job_id: str, seq: int) -> Page:
        async with self._paging:
            return await self.read(lambda tx: frames.page(tx, job_id, seq))

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look_for_news()
                await self._ask_at_the_door()
            except (TuningAPIError, SQLAlchemyError) as error:
                log.warning("followed jobs could not be looked at: %s", error)
            due = asyncio.get_running_loop().time() - KEEP_ALIVE_SECONDS
            for reader in self._all_readers():
                if reader.spoke_at <= due:
                    reader.woken.set()

    async def _look_for_news(self) -> None:
        followed = list(self._feeds)
        heads = await self.read(lambda tx: history.heads(tx, followed))
        for job_id in followed:
            if job_id in self._feeds:
                self._feeds[job_id].look(*heads.get(job_id, (0, True)))

    async def _ask_at_the_door(self) -> None:
        """Cut the streams of a key that was revoked since."""
        is_good: dict[str, bool] = {}
        for reader in self._all_readers():
            if reader.key not in is_good:
                is_good[reader.key] = await _is_open(reader.door)
            if not is_good[reader.key]:
                reader.cut()

    def _all_readers(self) -> "list[Reader]":
        return [reader for feed in self._feeds.values() for reader in feed.readers]


class Feed:
    """The newest events of one job, as frames."""

    def __init__(self, feeds: Feeds, job_id: str, seq: int) -> None:
        self._feeds = feeds
        self.job_id = job_id
        self.readers: set[Reader] = set()
        self.last = seq
        """The newest event's number; the ring begins after the `seq` that is given."""
        self.is_over = False
        self._ring: list[bytes] = []
        self._bytes = 0
        self._joined: tuple[int, int, Page] = (-1, -1, (b"", 0))
        self._touched = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def add(self, reader: "Reader") -> None:
        self.readers.add(reader)
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    def remove(self, reader: "Reader") -> None:
        self.readers.discard(reader)
        if not self.readers and self._running is not None:
            self._running.cancel()

    def look(self, last_seq: int, is_final: bool) -> None:
        """Told how the job stands, in case a commit's word was lost."""
        if last_seq > self.last:
            self._touched.set()
        elif is_final and not self.is_over:
            self.is_over = True
            self._wake()

    async def after(self, seq: int) -> Page:
        """The next frames after `seq`, as far as there are any, and the last one's number."""
        if seq >= self.last:
            return b"", seq
        if seq < self.last - len(self._ring):
            return await self._feeds.page(self.job_id, seq)
        if self._joined[:2] != (seq, self.last):
            self._joined = (seq, self.last, self._join(seq))
        return self._joined[2]

    def _join(self, seq: int) -> Page:
        parts: list[bytes] = []
        size = 0
        for part in self._ring[seq - self.last :]:
            parts.append(part)
            size += len(part)
            if size >= CHUNK_BYTES:
                break
        return b"".join(parts), seq + len(parts)

    async def _run(self) -> None:
        with self._feeds.watcher.watch(f"job:{self.job_id}") as self._touched:
            while not self._feeds.watcher.is_closing:
                self._touched.clear()
                if not await self._read_on():
                    await self._touched.wait()
        self._wake()

    async def _read_on(self) -> bool:
        """Take in what is new; whether there may be more."""
        seq = self.last
        try:
            found = await self._feeds.read(
                lambda tx: list(history.rows_after(tx, self.job_id, seq, PAGE_EVENTS))
            )
        except (TuningAPIError, SQLAlchemyError) as error:  # the next look tries again
            log.warning("job %s: its events could not be read: %s", self.job_id, error)
            return False
        for row in found:
            self._keep(row["seq"], frames.frame(self.job_id, row))
        if found:
            self.is_over = found[-1]["type"] in FINAL
            self._wake()
        return len(found) == PAGE_EVENTS

    def _keep(self, seq: int, text: bytes) -> None:
        if seq != self.last + 1:  # what lay between was cleared away
            self._ring, self._bytes = [], 0
        self._ring.append(text)
        self._bytes += len(text)
        self.last = seq
        while len(self._ring) > 1 and (
            len(self._ring) > RING_EVENTS or self._bytes > self._feeds.ring_bytes
        ):
            self._bytes -= len(self._ring.pop(0))

    def _wake(self) -> None:
        for reader in self.readers:
            reader.woken.set()


class Reader:
    """One who follows a job."""

    def __init__(self, feeds: Feeds, feed: Feed, key: str, door: Door) -> None:
        self._feeds = feeds
        self.feed, self.key, self.door = feed, key, door
        self.woken = asyncio.Event()
        self.spoke_at = asyncio.get_running_loop().time()
        self._is_cut = False

    async def read(self, seq: int, first: bytes = b"") -> AsyncGenerator[bytes, None]:
        """What follows number `seq`, until the job's last event; one piece at each waking."""
        clock = asyncio.get_running_loop().time
        yield frames.OPENING + first
        while not self._is_cut:
            self.woken.clear()
            if self._feeds.watcher.is_closing:
                yield frames.closing()
                return
            try:
                body, seq = await self.feed.after(seq)
            except (TuningAPIError, SQLAlchemyError) as error:  # who comes back gets it then
                log.warning("job %s: a reader was sent away: %s", self.feed.job_id, error)
                return
            if not body and self.feed.is_over:
                return
            if not body and clock() - self.spoke_at >= KEEP_ALIVE_SECONDS:
                body = frames.KEEP_ALIVE
            if body:
                self.spoke_at = clock()
                yield body
            else:
                await self.woken.wait()

    def cut(self) -> None:
        """Its key is no good any longer."""
        self._is_cut = True
        self.woken.set()

    async def leave(self) -> None:
        self._feeds.leave(self)


async def _is_open(door: Door) -> bool:
    try:
        await door()
    except (AuthenticationError, PermissionError):
        return False
    return True

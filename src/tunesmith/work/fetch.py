"""Files from the API, or from addresses that it signed: gone on with where they were cut off."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tunesmith.errors import FailureClass, JobFailure, TuningAPIError
from tunesmith.spec.transfer import RemoteFile, RemoteFolder
from tunesmith.work.cache import Cache
from tunesmith.work.wire import Unreachable, Wire, told_as_unreachable

log = logging.getLogger(__name__)

TRIES = 3
"""For bytes that are not those that were announced."""
PATIENCE_SECONDS = 600.0
"""Without a byte from a signed address, before the job is told that it can't be had."""


@dataclass(frozen=True)
class Fetcher:
    """For one attempt: what it may have, and with which token."""

    wire: Wire
    cache: Cache
    path: str
    """Of the attempt's routes."""
    token: str
    patience_seconds: float = PATIENCE_SECONDS

    async def folder(self, wanted: RemoteFolder) -> dict[str, Path]:
        """All its files in the cache, by name. Raises JobFailure(download), FencedError."""
        return {file.name: await self.file(file) for file in wanted.files}

    async def file(self, wanted: RemoteFile) -> Path:
        """Where it is in the cache. Raises JobFailure(download), FencedError, OSError."""
        known = self.cache.find(wanted.sha256, wanted.size)
        if known is not None:
            return known
        async with self.cache.part(wanted.sha256) as part:
            for _ in range(TRIES):
                known = self.cache.find(wanted.sha256, wanted.size)
                if known is not None:
                    return known
                await self._fill(part, wanted)
                whole = await asyncio.to_thread(self.cache.take, part, wanted.sha256)
                if whole is not None:
                    return whole
                log.warning("%s came with other bytes than announced", wanted.name)
        raise _refused(wanted, f"its bytes were not those announced, {TRIES} times")

    async def _fill(self, part: Path, wanted: RemoteFile) -> None:
        """Until all bytes are there, whatever they are."""
        pause, heard = 0.2, time.monotonic()
        while (have := part.stat().st_size) < wanted.size:
            try:
                await self._go_on(part, wanted, have)
            except Unreachable as error:
                if part.stat().st_size > have:
                    pause, heard = 0.2, time.monotonic()
                if wanted.parts and time.monotonic() - heard > self.patience_seconds:
                    raise _refused(wanted, str(error)) from None
                log.info("%s: cut off at %d bytes: %s", wanted.name, have, error)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(pause * 2, 10)
            else:
                pause, heard = 0.2, time.monotonic()
        if have > wanted.size:
            part.open("wb").close()

    async def _go_on(self, part: Path, wanted: RemoteFile, have: int) -> None:
        """One request for what is missing, of one stretch. Raises Unreachable where it was cut."""
        start, end, url = _stretch(wanted, have)
        with part.open("r+b") as file:
            async with self._open(wanted, url, have - start) as reply:
                file.seek(have if reply.status_code == 206 else start)
                file.truncate()
                async for block in reply.aiter_bytes():  # as it comes: no byte waits for company
                    room = end - file.tell()
                    file.write(block[:room])
                    if len(block) > room:
                        raise Unreachable("more bytes came than were announced")
            if file.tell() < end:
                raise Unreachable("the answer ended early")

    @contextlib.asynccontextmanager
    async def _open(
        self, wanted: RemoteFile, url: str, offset: int
    ) -> AsyncIterator[httpx2.Response]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        headers["Accept-Encoding"] = "identity"
        if not url:
            path = f"{self.path}/files/{wanted.sha256}"
            async with self.wire.download(path, self.token, headers) as reply:
                yield reply
            return
        with told_as_unreachable():
            async with self.wire.strangers.stream("GET", url, headers=headers) as reply:
                if reply.status_code >= 400:
                    raise Unreachable(f"HTTP {reply.status_code} from {_host_of(url)}")
                yield reply


def _stretch(wanted: RemoteFile, have: int) -> tuple[int, int, str]:
    """Where the next byte is found: from, to, and an address; empty: the API's own."""
    start = 0
    for part in wanted.parts:
        if have < start + part.size:
            return start, start + part.size, part.url
        start += part.size
    if wanted.parts:
        raise _refused(wanted, "its parts are fewer than its bytes")
    return 0, wanted.size, ""


def _host_of(url: str) -> str:
    """Without the signature."""
    return httpx2.URL(url).host


def _refused(wanted: RemoteFile, why: str) -> JobFailure:
    return JobFailure(FailureClass.DOWNLOAD, f"{wanted.name} could not be fetched: {why}")


def as_failure(error: TuningAPIError, say: Callable[[str], str]) -> JobFailure:
    """What the API refuses to give is the job's end, or its next try's matter."""
    is_the_users = error.status_code in (400, 422)
    kind = FailureClass.USER_ERROR if is_the_users else FailureClass.DOWNLOAD
    return JobFailure(kind, say(error.message))

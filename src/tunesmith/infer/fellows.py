"""Processes of one server that serve the same model: a load reaches all of them, or none.

They meet in a folder. One that loads holds its lock, loads, and writes a proposal; each fellow
loads beside its old model and votes; then it is decided for all (`state.json`), or called off. A
fellow lives as long as it holds the lock of its own file: one that was killed is waited for by
nobody, and a proposer that was killed before it decided has decided against. A process that starts
later begins with what was decided last.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import TuningAPIError
from tunesmith.infer.house import House, Served
from tunesmith.infer.loading import Wanted
from tunesmith.manifest import write_durably
from tuning_sdk.errors import error_for

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.05


class Fellows:
    """This process among them."""

    def __init__(self, house: House, folder: Path, name: str = "") -> None:
        """`name` is unlike those of the others; the process's number where none is given."""
        self._house = house
        self._folder = folder
        self._me = name or str(os.getpid())
        self._member: IO[str] | None = None
        self._seen = 0
        """The last proposal that was looked at."""

    @contextlib.asynccontextmanager
    async def joined(self, wanted: Wanted | None) -> AsyncIterator[None]:
        """Load what was decided last, or else `wanted`, and follow the others until the end."""
        async with self._locked():
            self._member = _enlist(self._folder / f"fellow-{self._me}")
            state = self._read("state.json")
            self._seen = max(_number(state), _number(self._read("proposal.json")))
        wanted = _wanted(state) or wanted
        self._house.fellows = self
        if wanted is not None:
            self._house.put(await self._house.prepare(wanted))
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            (self._folder / f"fellow-{self._me}").unlink(missing_ok=True)
            self._member.close()

    async def load(self, wanted: Wanted) -> Served:
        """Raises what kept any of them from it; then all keep what they have."""
        async with self._locked():
            fresh = await self._house.prepare(wanted)
            number = self._seen = self._seen + 1
            told = {"number": number, "wanted": _plain(wanted), "proposer": self._me}
            others = self._living()
            self._write("proposal.json", told)
            try:
                await self._gather(others, "vote", number)
            except BaseException:
                self._write(f"off-{number}", {})
                raise
            self._write("state.json", told)
            self._house.put(fresh)
            await self._gather(others, "done", number)
            self._sweep()
            return fresh

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            told = self._read("proposal.json")
            if _number(told) > self._seen:
                self._seen = _number(told)
                await self._take_part(told)

    async def _take_part(self, told: dict[str, Any]) -> None:
        number, wanted = _number(told), _wanted(told)
        assert wanted is not None
        try:
            fresh = await self._house.prepare(wanted)
        except TuningAPIError as error:
            self._write(f"vote-{number}-{self._me}", {"no": error.message, "is": error.status_code})
            return
        self._write(f"vote-{number}-{self._me}", {})
        if await self._is_decided(number, str(told["proposer"])):
            self._house.put(fresh)
            self._write(f"done-{number}-{self._me}", {})

    async def _is_decided(self, number: int, proposer: str) -> bool:
        while True:
            is_alive = self._is_alive(proposer)  # before the look: what it left is final then
            if _number(self._read("state.json")) >= number:
                return True
            if not is_alive or (self._folder / f"off-{number}").exists():
                log.warning("the load number %d was called off", number)
                return False
            await asyncio.sleep(LOOK_SECONDS)

    async def _gather(self, others: set[str], word: str, number: int) -> None:
        """Wait until each fellow that lives has said it. Raises the first refusal."""
        waiting = set(others)
        while waiting:
            for one in sorted(waiting):
                place = self._folder / f"{word}-{number}-{one}"
                if place.exists():
                    if "no" in (said := self._read(place.name)):
                        refused = f"another process of this server refused: {said['no']}"
                        raise error_for(int(said["is"]), refused)
                    waiting.discard(one)
                elif not self._is_alive(one):
                    waiting.discard(one)
            await asyncio.sleep(LOOK_SECONDS)

    def _living(self) -> set[str]:
        found = {each.name.removeprefix("fellow-") for each in self._folder.glob("fellow-*")}
        return {one for one in found - {self._me} if self._is_alive(one)}

    def _is_alive(self, one: str) -> bool:
        try:
            with (self._folder / f"fellow-{one}").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _sweep(self) -> None:
        for pattern in ("vote-*", "done-*", "off-*"):
            for each in self._folder.glob(pattern):
                each.unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self._folder / name).read_bytes()))
        except FileNotFoundError:
            return {}

    def _write(self, name: str, told: dict[str, Any]) -> None:
        """Whole or not at all."""
        own = self._folder / f".{name}-{self._me}"
        write_durably(own, json.dumps(told).encode())
        own.replace(self._folder / name)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        with (self._folder / "lock").open("w") as file:
            await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_EX)
            yield


def _enlist(place: Path) -> IO[str]:
    file = place.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _number(told: dict[str, Any]) -> int:
    return int(told.get("number", 0))


def _plain(wanted: Wanted) -> dict[str, Any]:
    told = asdict(wanted)
    places = {name: str(path) for name, path in wanted.adapters.items()}
    return told | {"path": str(wanted.path), "adapters": places}


def _wanted(told: dict[str, Any]) -> Wanted | None:
    if "wanted" not in told:
        return None
    kept = told["wanted"]
    adapters = {name: Path(path) for name, path in kept["adapters"].items()}
    return Wanted(Path(kept["path"]), kept["name"], kept["precision"], adapters)

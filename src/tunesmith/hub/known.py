"""What a submission needs to know, remembered for as long as the files behind it stay as they are.

A path is known by where it leads and by the stamp of what is there: both are looked at again each
time, which costs some ten microseconds, where finding out anew costs a thousand.
"""

import asyncio
import math
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.data.check import Verdict
from tunesmith.data.reading import Reading
from tunesmith.data.twins import Twins
from tunesmith.hub import checks, data, overlaps, tokenizers
from tunesmith.hub.data import Pinned
from tunesmith.hub.estimate import Ran
from tunesmith.hub.folder import read
from tunesmith.hub.names import FoundModel, find_base
from tunesmith.hub.principal import Principal
from tunesmith.hub.trace import Trace
from tunesmith.spec.hands import Capacity
from tunesmith.spec.records import Source
from tunesmith.spec.train import TrainSpec, Tuning
from tunesmith.store import claims

if TYPE_CHECKING:
    from tunesmith.hub import Hub

MAX_NAMES = 1000
WORKERS_SECONDS = 1.0


class Unknown(Exception):
    """It must be looked up, which may block."""


class Look(Protocol):
    """How a submission finds out."""

    def base(self, name: str, who: Principal, field: str) -> FoundModel: ...

    def pinned(self, name: str, who: Principal, field: str, reading: Reading) -> Pinned: ...

    def tokenizer(self, name: str, field: str) -> Source: ...

    def verdict(
        self, spec: TrainSpec, model: FoundModel, part: Pinned, tokenizer: Source | None
    ) -> Verdict | None: ...

    def overlap(self, training: Pinned, part: Pinned, reading: Reading) -> Twins | None:
        """Rows of `part` that are trained on as well; None where it was not looked at yet."""
        ...

    def workers(self) -> Collection[Capacity]: ...

    def history(self) -> Sequence[Ran]: ...

    def free_bytes(self) -> int:
        """On the workspace's disk. Raises NoSpaceError where no new work is taken."""
        ...


@dataclass
class _Entry:
    found: Any
    traces: tuple[Trace, ...]
    files: tuple[Trace, ...] = ()
    """In folders that are among the traces."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of a model's renderer, by the format of the rows."""
    turn: int = -1
    """Of the loop, in which it was last seen to hold."""

    def holds(self) -> bool:
        try:
            return all(trace.holds() for trace in self.traces) and all(
                file.holds_in_place() for file in self.files
            )
        except OSError:
            return False


class Known:
    """What was looked up before; raises Unknown for all else. Blocks on nothing but `stat`."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self.home = hub.settings.home
        self._free = 0
        self._turn, self._disk_turn, self._is_counting = 0, -1, False
        self._models: dict[str, _Entry] = {}
        self._data: dict[str, _Entry] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._overlaps: dict[str, Twins] = {}
        self._workers: tuple[float, Collection[Capacity]] = (-math.inf, ())

    def base(self, name: str, who: Principal, field: str) -> FoundModel:
        found: FoundModel = self._entry(self._models, name).found
        return found

    def pinned(self, name: str, who: Principal, field: str, reading: Reading) -> Pinned:
        found: Pinned = self._entry(self._data, name + reading.key).found
        return found

    def tokenizer(self, name: str, field: str) -> Source:
        raise Unknown

    def verdict(
        self, spec: TrainSpec, model: FoundModel, part: Pinned, tokenizer: Source | None
    ) -> Verdict | None:
        entry = self._models.get(model.name)
        if not isinstance(spec, Tuning) or entry is None or entry.found is not model:
            raise Unknown
        digest, sha256 = entry.digests.get(part.format), part.source.sha256
        if digest is None or sha256 is None:
            raise Unknown
        found = self._verdicts.get(checks.key(sha256, digest, spec, model.folder))
        if found is None:
            raise Unknown
        return found

    def overlap(self, training: Pinned, part: Pinned, reading: Reading) -> Twins | None:
        found = self._overlaps.get(overlaps.key(training.source, part.source, reading))
        if found is None:
            raise Unknown
        return found

    def workers(self) -> Collection[Capacity]:
        at, known = self._workers
        if time.monotonic() - at > WORKERS_SECONDS:
            raise Unknown
        return known

    def history(self) -> Sequence[Ran]:
        known = self._hub.history.fresh()
        if known is None:
            raise Unknown
        return known

    def free_bytes(self) -> int:
        if self._disk_turn != self._this_turn():
            self._free = _free_bytes(self._hub)
            self._disk_turn = self._turn
        return self._free

    def _entry(self, entries: dict[str, _Entry], name: str) -> _Entry:
        entry = entries.get(name)
        if entry is None:
            raise Unknown
        if entry.turn != self._this_turn():
            if not entry.holds() or not self._is_claimed(entry.found):
                raise Unknown
            entry.turn = self._turn
        return entry

    def _is_claimed(self, found: FoundModel | Pinned) -> bool:
        return isinstance(found, FoundModel) or data.claim(self._hub, found)

    def _this_turn(self) -> int:
        """Requests that came in together are answered in one turn of the loop: what was looked at
        for one of them was looked at after all of them were sent."""
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._next_turn)
        return self._turn

    def _next_turn(self) -> None:
        self._turn += 1
        self._is_counting = False

    # what a lookup found

    def keep_model(self, model: FoundModel) -> None:
        """One whose name is a path of the workspace; other names mean what the database says."""
        folder = model.folder
        try:
            named = Trace.of(self._hub.workspace / model.name)
            places = dict.fromkeys(map(str, (folder.path, folder.base)))
            traces = {place: Trace.of(place) for place in (named.path, *places)}
            files = tuple(map(Trace.of, folder.files))
        except (OSError, ValueError):
            return
        links = {file for file in files if file.path != file.real}
        entry = _Entry(model, (*traces.values(), *links), tuple(set(files) - links))
        is_path = named.real == str(folder.path) and model.is_here
        if is_path and _is_ours(entry, self._hub) and read(folder.path) == folder:
            self._keep(self._models, model.name, entry)

    def keep_data(self, name: str, trace: Trace | None, found: Pinned, path: Path) -> None:
        """`trace` was taken before the file was read."""
        if trace is not None and trace.real == str(path):
            self._keep(self._data, name, _Entry(found, (trace,)))

    def keep_verdict(
        self, spec: Tuning, model: FoundModel, part: Pinned, digest: str, found: Verdict
    ) -> None:
        entry = self._models.get(model.name)
        if entry is None or entry.found is not model:
            return
        entry.digests[part.format] = digest
        assert part.source.sha256
        _make_room(self._verdicts)
        self._verdicts[checks.key(part.source.sha256, digest, spec, model.folder)] = found

    def keep_overlap(self, place: str, found: Twins) -> None:
        _make_room(self._overlaps)
        self._overlaps[place] = found

    def keep_workers(self, known: Collection[Capacity]) -> None:
        self._workers = (time.monotonic(), known)

    def _keep(self, entries: dict[str, _Entry], name: str, entry: _Entry) -> None:
        if all(trace.is_settled for trace in (*entry.traces, *entry.files)):
            _make_room(entries)
            entries[name] = entry


class Lookup:
    """Finds out anew, and lets `Known` remember. Blocks: on files, on the database, on the hub."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub

    def base(self, name: str, who: Principal, field: str) -> FoundModel:
        found = find_base(self._hub.store, self._hub.settings, name, who, field)
        self._hub.known.keep_model(found)
        return found

    def pinned(self, name: str, who: Principal, field: str, reading: Reading) -> Pinned:
        try:
            trace = Trace.of(self._hub.workspace / name)
        except (OSError, ValueError):
            trace = None
        source = self._hub.find_data(name, who, field)
        found = data.pin(self._hub, source, field, reading)
        self._hub.known.keep_data(name + reading.key, trace, found, source.path)
        return found

    def tokenizer(self, name: str, field: str) -> Source:
        return tokenizers.pin(self._hub, name, field)

    def verdict(
        self, spec: TrainSpec, model: FoundModel, part: Pinned, tokenizer: Source | None
    ) -> Verdict | None:
        if not isinstance(spec, Tuning):
            looked = checks.measured(self._hub, spec, model.folder, part, tokenizer)
            return checks.UNASKED.model_copy(update={"measure": looked})
        digest = self._hub.renderer(model.folder, part.format).digest
        assert part.source.sha256
        found = checks.kept(self._hub, spec, model.folder, part.source.sha256, digest)
        if found is not None:
            self._hub.known.keep_verdict(spec, model, part, digest, found)
        return found

    def overlap(self, training: Pinned, part: Pinned, reading: Reading) -> Twins | None:
        place = overlaps.key(training.source, part.source, reading)
        found = overlaps.kept(self._hub, place)
        if found is not None:
            self._hub.known.keep_overlap(place, found)
        return found

    def workers(self) -> Collection[Capacity]:
        known = self._hub.store.read(claims.known_workers).values()
        self._hub.known.keep_workers(known)
        return known

    def history(self) -> Sequence[Ran]:
        return self._hub.history.recent()

    def free_bytes(self) -> int:
        return _free_bytes(self._hub)


def _free_bytes(hub: "Hub") -> int:
    hub.space.refuse()
    return shutil.disk_usage(hub.known.home).free


def _is_ours(entry: _Entry, hub: "Hub") -> bool:
    """Whether all of it lies in the workspace, so that the database has no say in it."""
    roots = list(_roots(hub))
    places = [Path(trace.real) for trace in (*entry.traces, *entry.files)]
    return all(any(place.is_relative_to(root) for root in roots) for place in places)


def _roots(hub: "Hub") -> Iterator[Path]:
    yield hub.workspace
    for root in hub.settings.allowed_roots:
        yield root.resolve()


def _make_room(entries: dict[str, Any]) -> None:
    if len(entries) >= MAX_NAMES:
        entries.clear()

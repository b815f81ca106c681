"""Checkpoints on their way to the API while training goes on: one at a time, the newest next."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import FencedError, TuningAPIError
from tunesmith.manifest import MANIFEST, Manifest
from tunesmith.spec.pipe import Checkpointed, Notice
from tunesmith.work.cache import Cache, link
from tunesmith.work.send import Parcel, Sender, Unsendable

log = logging.getLogger(__name__)
Say = Callable[[Checkpointed | Notice], None]


@dataclass
class Outbound:
    """Of one attempt that sends. `say` hears of a checkpoint once the API has all of it."""

    sender: Sender
    folder: Path
    """Second names of what is to be sent: the trainer may let go of its own."""
    cache: Cache
    say: Say
    _waiting: Checkpointed | None = None
    _going: Checkpointed | None = None
    _kept: set[str] = field(default_factory=set)
    """Digests of the files of the last one that was sent."""
    _new: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, made: Checkpointed) -> None:
        """Send this one next; an older one that waits is not sent at all."""
        try:
            target = self._place(made)
            _link_tree(Path(made.path), target)
        except OSError as error:
            log.warning("step %d: the checkpoint can't be kept for sending: %s", made.step, error)
            return
        if self._waiting is not None:
            self._let_go(self._waiting)
        self._waiting = made
        self._new.set()

    async def run(self) -> None:
        """For as long as the attempt trains."""
        while True:
            await self._new.wait()
            self._new.clear()
            while self._waiting is not None:
                self._going, self._waiting = self._waiting, None
                await self._send(self._going)
                self._let_go(self._going)
                self._going = None

    def left(self) -> Checkpointed | None:
        """The newest one that the API has not got, once `run` was stopped."""
        if self._waiting is not None and self._going is not None:
            self._let_go(self._going)
        return self._waiting or self._going

    def parcel(self, made: Checkpointed) -> Parcel:
        return Parcel(
            kind="checkpoint",
            step=made.step,
            folder=str(self._place(made)),
            manifest_sha256=made.manifest_sha256,
        )

    async def _send(self, made: Checkpointed) -> None:
        try:
            path = await self.sender.send(self.parcel(made))
        except FencedError:
            return  # the heartbeat hears of it too
        except (Unsendable, TuningAPIError, OSError) as error:
            log.warning("step %d: the checkpoint was not sent: %s", made.step, error)
            told = f"the checkpoint of step {made.step} could not be sent: {error}"
            self.say(Notice(level="warning", code="checkpoint_unsent", message=told[:4000]))
            return
        await asyncio.to_thread(self._keep, made)
        self.say(made.model_copy(update={"path": path}))

    def _keep(self, made: Checkpointed) -> None:
        """The next attempt may be this host's: then it need not fetch the newest of them."""
        place = self._place(made)
        kept = {made.manifest_sha256: place / MANIFEST}
        with contextlib.suppress(OSError, ValueError):
            body = (place / MANIFEST).read_bytes()
            files = Manifest.model_validate_json(body).files
            kept |= {entry.sha256: place / entry.path for entry in files}
        for sha256, path in kept.items():
            self.cache.adopt(path, sha256)
        self.forget(but=set(kept))
        self._kept = set(kept)
        self.cache.thin()

    def forget(self, but: AbstractSet[str] = frozenset()) -> None:
        """Let go of the checkpoints that were kept for a next attempt."""
        for sha256 in self._kept - but:
            self.cache.drop(sha256)

    def _place(self, made: Checkpointed) -> Path:
        return self.folder / f"step-{made.step}-{made.manifest_sha256[:12]}"

    def _let_go(self, made: Checkpointed) -> None:
        shutil.rmtree(self._place(made), ignore_errors=True)


def _link_tree(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in source.rglob("*"):
        if path.is_file() and not path.is_symlink():
            link(path, target / path.relative_to(source))

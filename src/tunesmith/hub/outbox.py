"""The duty that sends webhook messages: each endpoint has a lane of its own, so that one that hangs
holds up no other."""

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from tunesmith.errors import TuningAPIError
from tunesmith.hub.delivery import GONE, Answer, Sender
from tunesmith.store import outbox, webhooks
from tunesmith.store.outbox import Message

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)

DUTY = "outbox"
LANE_WIDTH = 4
"""Messages on their way to one endpoint; one, where the last was not taken."""
MAX_ON_THE_WAY = 128
LEASE_SECONDS = 20.0
"""Longer than one try takes."""
LOOK_AGAIN_SECONDS = 1.0
"""Also where no commit rings: one of another process, a duty that has become free."""
LAST_TRIES_SECONDS = 2.0
SWEEP_SECONDS = 3600.0
FIRST_WAIT_SECONDS = 1.0
MAX_WAIT_SECONDS = 3600.0
MAX_REST_SECONDS = 60.0


@dataclass
class _Lane:
    on_the_way: int = 0
    failures: int = 0
    """In a row, whatever the message."""
    rests_until: float = 0.0
    """Monotonic seconds."""

    @property
    def room(self) -> int:
        return (1 if self.failures else LANE_WIDTH) - self.on_the_way


class Outbox:
    """A task of the server's. `run` ends only when it is cancelled."""

    def __init__(self, hub: "Hub", sender: Sender) -> None:
        self._hub, self._sender = hub, sender
        self._holder = hub.duties.holder
        self._lanes: dict[str, _Lane] = {}
        self._rung = asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()
        self._sweep_at = 0.0
        self._has_taken_over = False

    async def run(self) -> None:
        try:
            with self._hub.watcher.watch(outbox.TOPIC) as self._rung:
                while True:
                    self._rung.clear()
                    wait = await self._turn_safely()
                    if wait > 0:
                        await self._hub.wait(self._rung, min(wait, LOOK_AGAIN_SECONDS))
        finally:
            await self._leave()

    async def _leave(self) -> None:
        """What is on its way gets a moment more; the rest is given back."""
        if not self._sending:
            return
        _, late = await asyncio.wait(self._sending, timeout=LAST_TRIES_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self._hub.write(lambda tx: outbox.release(tx, self._holder))

    async def _turn_safely(self) -> float:
        try:
            return await self._turn()
        except TuningAPIError as error:  # a full disk, a database that is away
            log.warning("webhooks wait: %s", error)
        except Exception:
            log.exception("a turn of the outbox failed")
        return LOOK_AGAIN_SECONDS

    async def _turn(self) -> float:
        """Start what can be sent now. Returns the seconds until there may be more."""
        if not await self._hub.duty(DUTY):
            return LOOK_AGAIN_SECONDS
        await self._take_over()
        await self._sweep()
        waits = [LOOK_AGAIN_SECONDS]
        found = self._hub.store.read(outbox.lanes)
        self._forget_idle({lane.endpoint_id for lane in found})
        for one in found:
            lane = self._lanes.setdefault(one.endpoint_id, _Lane())
            wait = max(one.wait_seconds, lane.rests_until - time.monotonic())
            room = min(lane.room, MAX_ON_THE_WAY - len(self._sending))
            if room <= 0:
                continue  # the end of a try rings
            if wait > 0:
                waits.append(wait)
            else:
                await self._start(one.endpoint_id, lane, room)
        return min(waits)

    async def _take_over(self) -> None:
        """Once: where no other server can be, whoever held something is dead."""
        if self._hub.store.is_alone and not self._has_taken_over:
            await self._hub.write(lambda tx: outbox.release(tx, None))
        self._has_taken_over = True

    async def _start(self, endpoint_id: str, lane: _Lane, room: int) -> None:
        messages = await self._hub.write(
            lambda tx: outbox.claim(tx, endpoint_id, self._holder, room, LEASE_SECONDS)
        )
        if not messages:  # another process was first
            lane.rests_until = time.monotonic() + FIRST_WAIT_SECONDS
        for message in messages:
            lane.on_the_way += 1
            task = asyncio.create_task(self._deliver(message, lane))
            self._sending.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: "asyncio.Task[None]") -> None:
        self._sending.discard(task)
        self._rung.set()  # there is room again

    async def _deliver(self, message: Message, lane: _Lane) -> None:
        try:
            answer = await self._sender.send(message.url, message.secrets, message.id, message.body)
            lane.failures = 0 if answer.error is None else lane.failures + 1
            rest = _wait(lane.failures, MAX_REST_SECONDS) if lane.failures > 1 else 0.0
            lane.rests_until = time.monotonic() + rest
            await self._record(message, answer)
        except TuningAPIError as error:  # it is sent again once its lease has ended
            log.warning("webhook %s: its end was not recorded: %s", message.id, error)
        except Exception:
            log.exception("webhook %s failed", message.id)
        finally:
            lane.on_the_way -= 1

    async def _record(self, message: Message, answer: Answer) -> None:
        holder = self._holder
        if answer.error is None:
            assert answer.status is not None
            status = answer.status
            await self._hub.write(lambda tx: outbox.record_taken(tx, message, holder, status))
            return
        error = answer.error
        log.info("webhook %s, try %d: %s", message.id, message.tries, error)
        wait = max(_wait(message.tries, MAX_WAIT_SECONDS), answer.retry_after_seconds or 0.0)
        wait = min(wait, outbox.GIVE_UP_SECONDS)

        def work(tx: Connection) -> None:
            outbox.postpone(tx, message, holder, wait, answer.status, error)
            if answer.status == GONE:
                webhooks.disable(tx, message.endpoint_id, message.url, error)

        await self._hub.write(work)

    def _forget_idle(self, owed: set[str]) -> None:
        for endpoint_id in [one for one, lane in self._lanes.items() if not lane.on_the_way]:
            if endpoint_id not in owed:
                del self._lanes[endpoint_id]

    async def _sweep(self) -> None:
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_SECONDS
            await self._hub.write(outbox.sweep)


def _wait(tries: int, most: float) -> float:
    """Seconds: doubled at each try, a quarter more or less, so that many do not come at once."""
    plain = min(most, FIRST_WAIT_SECONDS * 2.0 ** min(max(tries - 1, 0), 30))
    return plain * random.uniform(0.75, 1.25)

"""An attempt's end, kept on disk until the API has taken it, across a restart of the worker too."""

import asyncio
import contextlib
import logging
from enum import Enum, auto
from pathlib import Path

from pydantic import ValidationError

from tunesmith.errors import AuthenticationError, FailureClass, FencedError, TuningAPIError
from tunesmith.manifest import write_durably
from tunesmith.spec.hands import HeldAttempt, NumberedEvent, Orders, Report
from tunesmith.spec.records import Outcome
from tunesmith.spec.strict import Strict
from tunesmith.work.send import Parcel, Sender, Unsendable
from tunesmith.work.shipping import BATCH_BYTES, LogRest, send
from tunesmith.work.wire import Unreachable, Wire

log = logging.getLogger(__name__)
NAME = "exit.json"
_EVENTS_A_TIME = 200
FINISH_SECONDS = 600.0
"""For one try: the API reads every byte of the artifact before it answers."""


class Answered(Enum):
    """What became of an outcome."""

    TAKEN = auto()
    VOID = auto()
    """The API does not want it; what was made stays here."""
    NOT = auto()


class Receipt(Strict):
    """What must reach the API: the last events, then the outcome."""

    path: str
    token: str
    worker_id: str
    events: tuple[NumberedEvent, ...] = ()
    outcome: Outcome
    parcels: tuple[Parcel, ...] = ()
    """What goes before them, where the worker does not see the API's folder."""
    log: LogRest | None = None

    @property
    def attempt(self) -> HeldAttempt:
        job_id, fence = self.path.split("/")[-2:]
        return HeldAttempt(job_id=job_id, fence=int(fence))

    def keep(self, attempt_dir: Path) -> None:
        """Durable, readable by the owner only: it holds the attempt's token."""
        place = attempt_dir / NAME
        write_durably(place, self.model_dump_json().encode())
        place.chmod(0o600)

    async def deliver(self, wire: Wire) -> bool:
        """Insist until the API answers; that another attempt owns the job is an answer too.

        False where the API does not know the token: the receipt is worth keeping.
        """
        return await self.hand_over(wire) is not Answered.NOT

    async def hand_over(self, wire: Wire) -> "Answered":
        try:
            outcome = await self._send_parcels(wire)
            await self._send_log(wire)
            await self._send_events(wire)
            await wire.insist(f"{self.path}/finish", outcome, Orders, self.token, FINISH_SECONDS)
        except FencedError:
            log.warning("%s: another attempt owns the job; the outcome is void", self.path)
            return Answered.VOID
        except AuthenticationError as error:
            log.error("%s: the outcome is kept for later: %s", self.path, error)
            return Answered.NOT
        except TuningAPIError as error:
            log.error("%s: the API refused the outcome: %s", self.path, error)
            return Answered.VOID
        return Answered.TAKEN

    async def redeliver(self, wire: Wire, heartbeat_seconds: float) -> bool:
        """As `deliver`, and the lease is kept meanwhile: to send a model takes long."""
        keeper = asyncio.create_task(self._keep_lease(wire, heartbeat_seconds))
        try:
            return await self.deliver(wire)
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _keep_lease(self, wire: Wire, heartbeat_seconds: float) -> None:
        beat = Report(worker_id=self.worker_id)
        while self.parcels:
            with contextlib.suppress(Unreachable, TuningAPIError):
                await wire.ask(f"{self.path}/report", beat, Orders, self.token, 30)
            await asyncio.sleep(heartbeat_seconds)

    async def _send_parcels(self, wire: Wire) -> Outcome:
        """The outcome, or what became of it where its model can't be sent.

        Where another attempt owns the job, or this one's end was taken before, the end tells it.
        """
        sender, outcome = Sender(wire, self.path, self.token), self.outcome
        for parcel in self.parcels:
            try:
                await sender.send(parcel)
            except FencedError:
                return outcome
            except AuthenticationError:
                raise
            except (Unsendable, TuningAPIError, OSError) as error:
                log.error("%s: the %s was not sent: %s", self.path, parcel.kind, error)
                if parcel.kind == "artifact":
                    outcome = _unsent(outcome, error)
        return outcome

    async def _send_log(self, wire: Wire) -> None:
        """As far as it is taken: nothing else waits for it."""
        if self.log is None:
            return
        body, start = self.log.bytes(), self.log.offset
        for at in range(0, len(body), BATCH_BYTES):
            batch, offset = body[at : at + BATCH_BYTES], start + at
            try:
                await wire.patiently(
                    lambda batch=batch, offset=offset: send(  # type: ignore[misc]
                        wire, f"{self.path}/log", self.token, offset, batch
                    )
                )
            except AuthenticationError:
                raise
            except TuningAPIError as error:
                log.warning("%s: the end of its log is lost: %s", self.path, error)
                return

    async def _send_events(self, wire: Wire) -> None:
        """An event that is refused must not keep the outcome back."""
        for start in range(0, len(self.events), _EVENTS_A_TIME):
            batch = self.events[start : start + _EVENTS_A_TIME]
            report = Report(worker_id=self.worker_id, events=batch)
            try:
                await wire.insist(f"{self.path}/report", report, Orders, self.token)
            except (FencedError, AuthenticationError):
                raise
            except TuningAPIError as error:
                log.error("%s: the API refused events: %s", self.path, error)
                return

    @staticmethod
    def forget(attempt_dir: Path) -> None:
        (attempt_dir / NAME).unlink(missing_ok=True)


def _unsent(outcome: Outcome, error: Exception) -> Outcome:
    is_final = isinstance(error, TuningAPIError)
    return Outcome(
        kind="failed",
        step=outcome.step,
        failure_class=FailureClass.NO_ARTIFACT if is_final else FailureClass.INFRA_LOST,
        message=f"the model was made, but could not be sent to the API: {error}"[:8000],
    )


def left_over(jobs: Path, job_id: str = "*") -> list[tuple[Path, Receipt]]:
    """Receipts that an earlier worker could not deliver, with the attempts' folders."""
    found = []
    for place in sorted(jobs.glob(f"{job_id}/attempts/*/{NAME}")):
        try:
            receipt = Receipt.model_validate_json(place.read_bytes())
            assert receipt.attempt
            found.append((place.parent, receipt))
        except (OSError, ValueError) as error:
            log.error("a receipt cannot be read: %s: %s", place, _reason(error))
    return found


def _reason(error: Exception) -> str:
    """Without the receipt's words: there is a token among them."""
    if isinstance(error, ValidationError):
        return str(error.errors(include_url=False, include_input=False)[0]["msg"])
    return type(error).__name__

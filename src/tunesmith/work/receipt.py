"""An attempt's end, kept on disk until the API has taken it, across a restart of the worker too."""

import logging
from pathlib import Path

from pydantic import ValidationError

from tunesmith.errors import AuthenticationError, FencedError, TuningAPIError
from tunesmith.manifest import write_durably
from tunesmith.spec.hands import HeldAttempt, NumberedEvent, Orders, Report
from tunesmith.spec.records import Outcome
from tunesmith.spec.strict import Strict
from tunesmith.work.wire import Wire

log = logging.getLogger(__name__)
NAME = "exit.json"
_EVENTS_A_TIME = 200
FINISH_SECONDS = 600.0
"""For one try: the API reads every byte of the artifact before it answers."""


class Receipt(Strict):
    """What must reach the API: the last events, then the outcome."""

    path: str
    token: str
    worker_id: str
    events: tuple[NumberedEvent, ...] = ()
    outcome: Outcome

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
        try:
            await self._send_events(wire)
            await wire.insist(
                f"{self.path}/finish", self.outcome, Orders, self.token, FINISH_SECONDS
            )
        except FencedError:
            log.warning("%s: another attempt owns the job; the outcome is void", self.path)
        except AuthenticationError as error:
            log.error("%s: the outcome is kept for later: %s", self.path, error)
            return False
        except TuningAPIError as error:
            log.error("%s: the API refused the outcome: %s", self.path, error)
        return True

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


def left_over(jobs: Path) -> list[tuple[Path, Receipt]]:
    """Receipts that an earlier worker could not deliver, with the attempts' folders."""
    found = []
    for place in sorted(jobs.glob(f"*/attempts/*/{NAME}")):
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

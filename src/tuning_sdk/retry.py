"""When a request is sent again, and after how long; and what an answer's error means.

Nothing here sends or sleeps, so that a client of either kind, waiting or async, can use it.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from tuning_sdk.errors import NotReadyError, RateLimitError, TuningAPIError, error_for

MAX_WAIT_SECONDS = 60.0
PATIENCE = 12
"""Tries in a row at a server that was there before: about a minute, time for its restart."""
_FIRST_WAIT_SECONDS = 0.25
_LONGEST_BACKOFF_SECONDS = 8.0
_MAX_MESSAGE = 2000


@dataclass(frozen=True)
class Call:
    """One request: what is asked for. `path` begins with a slash, its parts quoted."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    read_seconds: float | None = None
    """The longest silence while the answer is waited for; None means the client's time limit."""

    @property
    def is_repeatable(self) -> bool:
        """Whether sending it twice does no more than sending it once."""
        return self.method in {"GET", "HEAD", "PUT", "DELETE"} or self.idempotency_key is not None


def should_retry_status(status: int) -> bool:
    """507 (no space) and 501 stay what they are, however often they are asked."""
    return status in {408, 429} or (status >= 500 and status not in {501, 505, 507})


def wait_seconds(
    tried: int, retry_after: float | None = None, chance: float | None = None
) -> float:
    """The pause after the `tried`th try (1, 2, …): doubled each time, with full jitter.

    A server's Retry-After is honoured up to MAX_WAIT_SECONDS. `chance` in 0 … 1 replaces the die.
    """
    ceiling = min(_LONGEST_BACKOFF_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(tried - 1, 16))
    share = random.random() if chance is None else chance
    pause = ceiling * (0.5 + share / 2)
    return (
        pause if retry_after is None else min(MAX_WAIT_SECONDS, max(0.0, retry_after) + share / 10)
    )


def retry_after_of(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds, from either form of Retry-After; None where it is absent or unreadable."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
        return seconds if 0 <= seconds < 1e9 else None
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(text)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> TuningAPIError:
    """The error that the server raised, from `{"error": {…}}` or from `{"detail": …}`."""
    told = _told(body)
    message = told.pop("message", None) or _unexplained(status, headers, body)
    error = error_for(status, message[:_MAX_MESSAGE], code=told.get("code"), type_=told.get("type"))
    error.param = told.get("param")
    error.details = told.get("details", [])
    if isinstance(error, RateLimitError | NotReadyError):
        error.retry_after = retry_after_of(headers)
    return error


def _told(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(answer, dict):
        return {}
    error = answer.get("error", answer.get("detail"))
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, list):
        return {"message": _joined(error), "details": _entries(error)}
    if not isinstance(error, dict):
        return {}
    told = {name: error[name] for name in ("message", "code", "type", "param") if name in error}
    told = {name: value for name, value in told.items() if isinstance(value, str)}
    inner = error.get("details", error.get("errors"))
    if isinstance(inner, list):
        told["details"] = _entries(inner)
    return told


def _entries(items: list[Any]) -> list[dict[str, Any]]:
    return [item if isinstance(item, dict) else {"msg": str(item)} for item in items]


def _joined(items: list[Any]) -> str:
    lines = [line_of(entry) for entry in _entries(items)]
    if len(lines) <= 1:
        return "".join(lines)
    return f"{lines[0]} (and {len(lines) - 1} more)"


def line_of(entry: Mapping[str, Any]) -> str:
    """One fault as a line: `learning_rate: must be over 0`."""
    place = entry.get("loc", entry.get("line", entry.get("param")))
    if isinstance(place, list | tuple):
        parts = [str(part) for part in place if part not in {"body", "query", "path"}]
        counted = parts[:2] if parts[:1] in (["line"], ["row"]) else []
        shown = [" ".join(counted), ".".join(parts[len(counted) :])]
        place = ", ".join(part for part in shown if part)
    message = entry.get("msg", entry.get("message", entry.get("reason", "")))
    return f"{place}: {message}" if place not in {None, ""} else str(message)


def _unexplained(status: int, headers: Mapping[str, str], body: bytes) -> str:
    if 300 <= status < 400:
        where = headers.get("location", "elsewhere")
        return f"the server points to {where} ({status}); give that as base_url"
    kind = headers.get("content-type", "nothing").partition(";")[0]
    start = body[:120].decode("utf-8", "replace").strip().replace("\n", " ")
    told = f": {start}" if start and kind.startswith("text/plain") else f" with {kind}"
    return f"the server answered {status}{told}"

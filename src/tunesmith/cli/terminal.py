"""What every command shares: data to stdout, talk to stderr, errors in a line, exit codes."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from tunesmith.cli.text import clean, columns
from tuning_sdk.errors import (
    AuthenticationError,
    ConnectionError,
    NotFoundError,
    PermissionError,
    TuningAPIError,
)

OK, FAILED, USAGE, NOT_FOUND, AUTH, JOB_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
_MAX_FAULTS = 20


class CommandError(Exception):
    """The command cannot go on: a sentence, what to do about it, and the exit code."""

    def __init__(self, message: str, hint: str = "", code: int = FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def show(text: str) -> None:
    """Data, for a reader or the next program."""
    print(clean(text), flush=True)


def show_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str), flush=True)


def show_rows(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    show(columns(cells, list(headers)))


def tell(text: str) -> None:
    """Talk, beside the data."""
    print(clean(text), file=sys.stderr, flush=True)


def suggest(command: str, why: str = "next") -> None:
    """The next useful command, to a human only."""
    if sys.stderr.isatty():
        tell(f"{why}: {command}")


def explain(error: Exception) -> int:
    """Tell an error in a line with its hint, its faults below it; returns the exit code."""
    tell(f"error: {error}")
    faults = [_fault(entry) for entry in getattr(error, "details", [])[:_MAX_FAULTS]]
    for fault in faults if len(faults) > 1 else [part for part in faults if part not in str(error)]:
        tell(f"  {fault}")
    hint = getattr(error, "hint", "") or _hint(error)
    if hint:
        tell(f"hint: {hint}")
    return code_of(error)


def code_of(error: Exception) -> int:
    if isinstance(error, CommandError):
        return error.code
    if isinstance(error, AuthenticationError | PermissionError):
        return AUTH
    if isinstance(error, NotFoundError | FileNotFoundError):
        return NOT_FOUND
    return FAILED


def _fault(entry: dict[str, Any]) -> str:
    from tuning_sdk.retry import line_of

    return line_of(entry)


def _hint(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "start a server with `tunesmith up`, or name one with --server URL"
    if isinstance(error, AuthenticationError):
        return "give a key with --api-key or TUNESMITH_API_KEY; `tunesmith keys create` makes one"
    if isinstance(error, TuningAPIError) and error.status_code >= 500:
        return "the server's log says more: logs/tunesmith.log in its workspace"
    return ""

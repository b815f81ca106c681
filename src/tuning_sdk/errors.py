"""Every error a caller can meet: one tree, raised by the server and rebuilt by the client.

TuningAPIError                 500  internal
  BadRequestError              400  the request can be read but asks for something impossible
  AuthenticationError          401  no key, or a wrong one
  PermissionError              403  a key without the right
  NotFoundError                404  no such job, data set, model
  ConflictError                409  the state does not allow it (cancel an ended job)
    FencedError                409  another attempt owns this job now
  PayloadTooLargeError         413  a body over the limit
  ValidationError              422  a field or a line is wrong; see `validation_errors`
  RateLimitError               429  the waiting line is full; `retry_after` seconds
  ServerError                  5xx  the server's own fault
    NotReadyError              503  nothing is loaded yet, or no worker answers
    NoSpaceError               507  the disk is full
  TimeoutError                      the client gave up waiting
  ConnectionError                   the server could not be reached

A message says what was wrong, where, and what would be right. `param` names the field.
"""

from collections.abc import Sequence
from typing import Any


class TuningAPIError(Exception):
    """The root. `status_code`, `error_type` and `error_code` default to those of the class."""

    status_code: int = 500
    error_type: str = "server_error"
    error_code: str = "internal"

    def __init__(
        self,
        message: str,
        status_code: int | None = None,
        error_type: str | None = None,
        error_code: str | None = None,
        *,
        param: str | None = None,
        details: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = status_code or type(self).status_code
        self.error_type = error_type or type(self).error_type
        self.error_code = error_code or type(self).error_code
        self.param = param
        self.details = list(details)


class BadRequestError(TuningAPIError):
    status_code, error_type, error_code = 400, "invalid_request_error", "bad_request"


class AuthenticationError(TuningAPIError):
    status_code, error_type, error_code = 401, "authentication_error", "invalid_api_key"


class PermissionError(TuningAPIError):
    status_code, error_type, error_code = 403, "permission_error", "forbidden"


class NotFoundError(TuningAPIError):
    status_code, error_type, error_code = 404, "invalid_request_error", "not_found"


class ConflictError(TuningAPIError):
    status_code, error_type, error_code = 409, "conflict_error", "conflict"


class FencedError(ConflictError):
    error_code = "fenced"


class PayloadTooLargeError(TuningAPIError):
    status_code, error_type, error_code = 413, "invalid_request_error", "too_large"


class ValidationError(TuningAPIError):
    status_code, error_type, error_code = 422, "invalid_request_error", "validation_error"

    @property
    def validation_errors(self) -> list[dict[str, Any]]:
        """One entry a fault: `loc` (field, or line), `msg`."""
        return self.details


class RateLimitError(TuningAPIError):
    status_code, error_type, error_code = 429, "rate_limit_error", "rate_limited"
    retry_after: float | None = None


class ServerError(TuningAPIError):
    pass


class NotReadyError(ServerError):
    status_code, error_code = 503, "not_ready"
    retry_after: float | None = None


class NoSpaceError(ServerError):
    status_code, error_code = 507, "no_space"


class TimeoutError(TuningAPIError):
    status_code, error_type, error_code = 408, "timeout_error", "timeout"


class ConnectionError(TuningAPIError):
    status_code, error_type, error_code = 503, "connection_error", "connection_failed"


def error_for(
    status: int, message: str, *, code: str | None = None, type_: str | None = None
) -> TuningAPIError:
    """Rebuild the error that a server raised, by its code and then by its status."""
    tree: list[type[TuningAPIError]] = [TuningAPIError]
    for leaf in tree:
        tree += leaf.__subclasses__()
    tree = [leaf for leaf in tree if leaf not in (TuningAPIError, ConnectionError)]
    by_code = [leaf for leaf in tree if leaf.error_code == code and leaf.status_code == status]
    by_status = [leaf for leaf in tree if leaf.status_code == status]
    fallback = ServerError if status >= 500 else BadRequestError
    kind = (by_code or by_status or [fallback])[0]
    return kind(message, status, type_, code)

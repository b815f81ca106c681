"""How often one may ask: `10/minute`, for each key, or address where no key is shown."""

import logging
import math
import time
from typing import TYPE_CHECKING

from tunesmith.errors import BadRequestError, RateLimitError

if TYPE_CHECKING:
    from limits import RateLimitItem

log = logging.getLogger(__name__)
MEMORY = "async+memory://"


class Rates:
    """Counts in this process, or in a Redis that several share (`async+redis://…`)."""

    def __init__(self, rule: str, storage: str = MEMORY) -> None:
        """An empty rule limits nothing. Raises BadRequestError where it is none."""
        self._rules: list[RateLimitItem] = []
        if not rule:
            return
        from limits import parse_many
        from limits.aio.strategies import MovingWindowRateLimiter
        from limits.errors import ConfigurationError
        from limits.storage import storage_from_string

        try:
            self._rules = parse_many(rule)
            more: dict[str, str | bool] = {}
            if storage != MEMORY:
                more = {"implementation": "redispy", "wrap_exceptions": True}
            self._limiter = MovingWindowRateLimiter(storage_from_string(storage, **more))
        except (ConfigurationError, ValueError, LookupError, ImportError) as error:
            raise BadRequestError(
                f"the rate limit {rule!r} (kept in {storage}) cannot be: {error}; "
                "write it as 10/minute, or 10/minute;100/hour"
            ) from None

    async def spend(self, who: str) -> None:
        """Raises RateLimitError (429) with the seconds until there is room again."""
        if not self._rules:
            return
        from limits.errors import StorageError

        try:
            await self._spend(who)
        except StorageError as error:  # better served too often than not at all
            log.error("rates cannot be counted: %s", error.storage_error)

    async def _spend(self, who: str) -> None:
        for rule in self._rules:
            if not await self._limiter.hit(rule, who):
                window = await self._limiter.get_window_stats(rule, who)
                error = RateLimitError(f"over {rule}; ask again later", error_code="rate_limited")
                error.retry_after = max(1, math.ceil(window.reset_time - time.time()))
                raise error

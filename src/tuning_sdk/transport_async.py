"""The same for a program that awaits: requests, their retries, and streams."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from tuning_sdk.errors import TuningAPIError
from tuning_sdk.retry import Call, error_of, wait_seconds
from tuning_sdk.transport import MAX_ERROR_BYTES, Wire, is_loopback, parsed


class AsyncTransport(Wire):
    """A connection pool with a key, of one event loop."""

    _http: httpx2.AsyncClient

    def __init__(
        self, base_url: str, api_key: str | None, timeout: float, max_retries: int
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        is_here = is_loopback(self.base_url)
        self._http = httpx2.AsyncClient(
            base_url=self.base_url, headers=self._headers, trust_env=not is_here
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call) -> Any:
        """As `Transport.send`."""
        tried = 0
        while True:
            tried += 1
            try:
                return parsed(await self._once(call))
            except TuningAPIError as error:
                if not self._is_worth_a_retry(call, error, tried):
                    raise
                await asyncio.sleep(wait_seconds(tried, getattr(error, "retry_after", None)))

    @asynccontextmanager
    async def stream(self, call: Call) -> AsyncIterator[httpx2.Response]:
        """As `Transport.stream`."""
        with self._told():
            response = await self._http.send(self._request(call), stream=True)
        self._has_answered = True
        try:
            with self._told():
                await _refuse(response)
                yield response
        finally:
            await response.aclose()

    async def _once(self, call: Call) -> httpx2.Response:
        with self._told():
            response = await self._http.send(self._request(call))
            self._has_answered = True
            await _refuse(response)
            return response


async def _refuse(response: httpx2.Response) -> None:
    if response.status_code < 300:
        return
    body = b""
    async for block in response.aiter_bytes():
        body += block
        if len(body) > MAX_ERROR_BYTES:
            break
    raise error_of(response.status_code, response.headers, body)

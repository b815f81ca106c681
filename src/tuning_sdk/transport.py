"""The one function through which every request goes, its retries, and its event streams."""

import json as json_text
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from ipaddress import ip_address
from typing import Any

import httpx2

from tuning_sdk.errors import ConnectionError, NotReadyError, TimeoutError, TuningAPIError
from tuning_sdk.retry import PATIENCE, Call, error_of, should_retry_status, wait_seconds

_CONNECT_SECONDS = 5.0
MAX_ERROR_BYTES = 1 << 20
_AGENT = "tuning-sdk/0.1.0"

Body = Callable[[], AbstractContextManager[dict[str, Any]]]
"""Opens what is sent along with a call, anew for each try: httpx2's `files=` and the like."""


class Wire:
    """What a waiting and an async transport have in common: where, with which key, how often."""

    _http: httpx2.Client | httpx2.AsyncClient

    def __init__(
        self, base_url: str, api_key: str | None, timeout: float, max_retries: int
    ) -> None:
        self.base_url = checked_url(base_url)
        self.timeout = timeout
        self.max_retries = max_retries
        self._has_answered = False
        self._headers = {"User-Agent": _AGENT, "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {checked_key(api_key)}"

    def _request(self, call: Call, more: dict[str, Any] | None = None) -> httpx2.Request:
        headers = dict(call.headers)
        if call.idempotency_key is not None:
            headers["Idempotency-Key"] = call.idempotency_key
        params = {name: value for name, value in call.params.items() if value is not None}
        extra: dict[str, Any] = {"params": params} if params else {}
        if call.json is not None:
            extra["content"] = json_text.dumps(call.json, ensure_ascii=True, allow_nan=False)
            headers["Content-Type"] = "application/json"
        silence = self.timeout if call.read_seconds is None else call.read_seconds
        extra["timeout"] = httpx2.Timeout(silence, connect=min(self.timeout, _CONNECT_SECONDS))
        return self._http.build_request(
            call.method, call.path, headers=headers, **extra, **(more or {})
        )

    def _is_worth_a_retry(self, call: Call, error: TuningAPIError, tried: int) -> bool:
        is_away = isinstance(error, ConnectionError | NotReadyError)
        tries = self.max_retries
        if is_away and self._has_answered and tries > 0:
            tries = max(tries, PATIENCE)
        is_unsent = isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
        if tried > tries or not (call.is_repeatable or is_unsent):
            return False
        return isinstance(error, ConnectionError | TimeoutError) or should_retry_status(
            error.status_code
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The library's errors, in the words of this package."""
        try:
            yield
        except httpx2.TimeoutException as error:
            raise TimeoutError(
                f"no answer from {self.base_url} within the time limit ({type(error).__name__})"
            ) from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise ConnectionError(f"cannot reach {self.base_url}: {error}") from error


class Transport(Wire):
    """A connection pool with a key. `sleep` is what waits between two tries."""

    _http: httpx2.Client

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float,
        max_retries: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self.sleep = sleep
        is_here = is_loopback(self.base_url)
        self._http = httpx2.Client(
            base_url=self.base_url, headers=self._headers, trust_env=not is_here
        )

    def close(self) -> None:
        self._http.close()

    def send(self, call: Call, body: Body | None = None) -> Any:
        """Send, retry where that is safe, and return the parsed JSON (None for an empty answer).

        A server that answered before and is away now is given time for a restart, unless
        `max_retries` is 0. Raises the leaf of TuningAPIError that the server raised,
        ConnectionError, TimeoutError.
        """
        tried = 0
        while True:
            tried += 1
            try:
                return parsed(self._once(call, body))
            except TuningAPIError as error:
                if not self._is_worth_a_retry(call, error, tried):
                    raise
                self.sleep(wait_seconds(tried, getattr(error, "retry_after", None)))

    @contextmanager
    def stream(self, call: Call) -> Iterator[httpx2.Response]:
        """An answer that is read while it comes; not retried here. Raises as `send` does."""
        with self._told():
            response = self._http.send(self._request(call), stream=True)
        self._has_answered = True
        try:
            with self._told():
                _refuse(response)
                yield response
        finally:
            response.close()

    def _once(self, call: Call, body: Body | None) -> httpx2.Response:
        with self._told():
            if body is None:
                response = self._http.send(self._request(call))
            else:
                with body() as parts:
                    response = self._http.send(self._request(call, parts))
            self._has_answered = True
            _refuse(response)
            return response


def checked_url(base_url: str) -> str:
    """Without a slash at its end. Raises ValueError for what is no http(s) address."""
    try:
        url = httpx2.URL(base_url.strip())
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"base_url {base_url!r} is no address; write http://host:port")
    return str(url).rstrip("/")


def checked_key(api_key: str) -> str:
    """Raises ValueError, without showing the key, where a header cannot carry it."""
    key = api_key.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("api_key holds a character that no key has; copy it again")
    return key


def is_loopback(base_url: str) -> bool:
    """A machine's own address, which no proxy of the environment should stand before."""
    host = httpx2.URL(base_url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _refuse(response: httpx2.Response) -> None:
    if response.status_code < 300:
        return
    body = b""
    for block in response.iter_bytes():
        body += block
        if len(body) > MAX_ERROR_BYTES:
            break
    raise error_of(response.status_code, response.headers, body)


def parsed(response: httpx2.Response) -> Any:
    if not response.content:
        return None
    try:
        return json_text.loads(response.content)
    except (ValueError, RecursionError):
        kind = response.headers.get("content-type", "nothing")
        raise TuningAPIError(
            f"{response.request.url} answered {kind} where JSON was expected; is base_url right?",
            response.status_code,
        ) from None

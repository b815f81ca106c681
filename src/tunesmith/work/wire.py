"""The worker's line to the API: found anew after a restart, patient while it is away."""

import asyncio
import contextlib
import json
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from tunesmith.errors import AuthenticationError, FencedError, TuningAPIError
from tunesmith.spec.strict import Strict
from tuning_sdk.errors import error_for

log = logging.getLogger(__name__)

PREFIX = "/internal/v1"
ADDRESS = "api.json"
"""In the workspace's home: where its API is, by itself."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.2, 10.0
"""Between two tries; doubled each time."""
STRANGER_SECONDS = 600.0
"""How long a refused token is shown again: for a while, another server may have the port."""
Answer = TypeVar("Answer", bound=BaseModel)
T = TypeVar("T")


class Unreachable(Exception):
    """The API did not answer, or not with a sense: try again."""


class Nothing(Strict):
    """An answer without a body."""


class Wire:
    """HTTP to the API. Its address may change: `.tunesmith/api.json` is read at each try."""

    def __init__(
        self,
        home: Path,
        server: str | None = None,
        token: str | None = None,
        ca_bundle: str = "",
    ) -> None:
        """`ca_bundle`: a file of certificates to trust, where it is not the usual one."""
        self._home = home
        self._server = server
        self._token = token
        self.strangers = httpx2.AsyncClient(
            timeout=httpx2.Timeout(90, connect=5),
            trust_env=False,
            verify=ssl.create_default_context(cafile=ca_bundle) if ca_bundle else True,
        )
        """The connections; used from outside only for addresses that are not the API's."""
        self._is_away = False
        self._stirred = asyncio.Event()

    async def close(self) -> None:
        await self.strangers.aclose()

    async def ask(
        self,
        path: str,
        body: BaseModel | None,
        answer: type[Answer],
        token: str | None = None,
        seconds: float = 90,
    ) -> Answer:
        """POST once, or GET without a body.

        Raises Unreachable (API away, 5xx, no API), FencedError, TuningAPIError (4xx).

        What answers without the API's own words is not the API: a port is soon taken by another.
        """
        content = b"" if body is None else body.model_dump_json().encode()
        method = "GET" if body is None else "POST"
        return await self.send(method, path, content, answer, token, seconds)

    async def send(
        self,
        method: str,
        path: str,
        content: bytes,
        answer: type[Answer],
        token: str | None = None,
        seconds: float = 90,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """As `ask`, with bytes for a body, which are JSON where `headers` do not tell."""
        try:
            with told_as_unreachable():
                reply = await self.strangers.request(
                    method,
                    self._address() + PREFIX + path,
                    content=content,
                    headers={**self._own_headers(token), **headers},
                    timeout=httpx2.Timeout(seconds, connect=5),
                )
            said = _understood(reply, answer)
        except OSError as error:
            self._note(str(error))
            raise Unreachable(f"{type(error).__name__}: {error}") from None
        except Unreachable as error:
            self._note(str(error))
            raise
        self._note("")
        return said

    @contextlib.asynccontextmanager
    async def download(
        self, path: str, token: str, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx2.Response]:
        """An answer whose body the caller reads. Raises as `ask`, also while it is read."""
        with told_as_unreachable():
            url, own = self._address() + PREFIX + path, self._own_headers(token)
            async with self.strangers.stream("GET", url, headers={**own, **headers}) as reply:
                if reply.status_code >= 400:
                    await reply.aread()
                    _understood(reply, Nothing)
                yield reply

    async def insist(
        self,
        path: str,
        body: BaseModel | None,
        answer: type[Answer],
        token: str | None = None,
        seconds: float = 30,
    ) -> Answer:
        """Ask until it is answered, with growing pauses. Raises FencedError, TuningAPIError."""
        return await self.patiently(lambda: self.ask(path, body, answer, token, seconds))

    async def patiently(self, once: Callable[[], Awaitable[T]]) -> T:
        """Try until there is an answer, with growing pauses. Raises FencedError, TuningAPIError."""
        pause, stranger_since = FIRST_PAUSE_SECONDS, None
        while True:
            try:
                return await once()
            except Unreachable:
                stranger_since = None
            except AuthenticationError:
                stranger_since = stranger_since or time.monotonic()
                if time.monotonic() - stranger_since > STRANGER_SECONDS:
                    raise
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, MAX_PAUSE_SECONDS)

    def stir(self) -> None:
        """Whoever pauses tries again now."""
        self._stirred.set()
        self._stirred = asyncio.Event()

    def _own_headers(self, token: str | None) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {token or self._worker_token()}",
            "Content-Type": "application/json",
        }

    def _note(self, trouble: str) -> None:
        """One line when the API goes away, and one when it is back: then nobody waits longer."""
        if bool(trouble) == self._is_away:
            return
        self._is_away = bool(trouble)
        if trouble:
            log.warning("the API is away: %s", trouble)
        else:
            log.info("the API is back")
            self.stir()

    def _address(self) -> str:
        if self._server:
            return self._server.rstrip("/")
        try:
            found = json.loads((self._home / ADDRESS).read_bytes())
            url, has_ended = str(found["url"]), _has_ended(found)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise Unreachable("no API has written its address yet") from None
        if has_ended:
            raise Unreachable("the API that wrote its address has ended")
        return url

    def _worker_token(self) -> str:
        if self._token:
            return self._token
        try:
            token = (self._home / "worker.token").read_bytes().decode("ascii").strip()
        except (OSError, ValueError):
            token = ""
        if not token.isprintable() or not token:
            raise Unreachable("no worker token yet")
        return token


@contextlib.contextmanager
def told_as_unreachable() -> Iterator[None]:
    """What a connection can raise, as one thing."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, ssl.SSLError) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from None


def pid_space() -> str:
    """Where this process's id means something: containers count their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _has_ended(note: dict[str, object]) -> bool:
    """Whether the server is known to be gone: its port, then, may be anyone's."""
    pid = note.get("pid")
    return (
        isinstance(pid, int)
        and note.get("pid_space") == pid_space() != ""
        and not os.path.exists(f"/proc/{pid}")
    )


def _understood(reply: httpx2.Response, answer: type[Answer]) -> Answer:
    if reply.status_code >= 500 or reply.status_code == 429:
        raise Unreachable(f"HTTP {reply.status_code}")
    if reply.status_code >= 400:
        raise _refusal(reply)
    try:
        return answer.model_validate_json(reply.content or b"{}")
    except ValidationError as error:
        told = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Unreachable(f"an answer that is no {answer.__name__}: {told['msg']}") from None


def _refusal(reply: httpx2.Response) -> TuningAPIError:
    try:
        said = reply.json()["error"]
        code, message = said["code"], str(said["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unreachable(f"HTTP {reply.status_code}, not in this API's words") from None
    error = error_for(reply.status_code, message, code=code)
    return FencedError(message) if code == "fenced" else error

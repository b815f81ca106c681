"""The worker's line to the API: found anew after a restart, patient while it is away."""

import asyncio
import json
import logging
import os
import random
import time
from pathlib import Path
from typing import TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from tunesmith.errors import AuthenticationError, FencedError, TuningAPIError
from tunesmith.spec.strict import Strict
from tuning_sdk.errors import error_for

log = logging.getLogger(__name__)

PREFIX = "/internal/v1"
STRANGER_SECONDS = 600.0
"""How long a refused token is shown again: for a while, another server may have the port."""
Answer = TypeVar("Answer", bound=BaseModel)


class Unreachable(Exception):
    """The API did not answer, or not with a sense: try again."""


class Nothing(Strict):
    """An answer without a body."""


class Wire:
    """HTTP to the API. Its address may change: `.tunesmith/api.json` is read at each try."""

    def __init__(self, home: Path, server: str | None = None, token: str | None = None) -> None:
        self._home = home
        self._server = server
        self._token = token
        self._client = httpx2.AsyncClient(timeout=httpx2.Timeout(90, connect=5), trust_env=False)
        self._is_away = False

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(
        self,
        path: str,
        body: BaseModel,
        answer: type[Answer],
        token: str | None = None,
        seconds: float = 90,
    ) -> Answer:
        """POST once. Raises Unreachable (API away, 5xx, no API), FencedError, TuningAPIError (4xx).

        What answers without the API's own words is not the API: a port is soon taken by another.
        """
        try:
            said = _understood(await self._post(path, body, token, seconds), answer)
        except Unreachable as error:
            self._note(str(error))
            raise
        self._note("")
        return said

    async def insist(
        self,
        path: str,
        body: BaseModel,
        answer: type[Answer],
        token: str | None = None,
        seconds: float = 30,
    ) -> Answer:
        """POST until it is answered, with growing pauses. Raises FencedError, TuningAPIError."""
        pause, stranger_since = 0.2, None
        while True:
            try:
                return await self.ask(path, body, answer, token, seconds)
            except Unreachable:
                stranger_since = None
            except AuthenticationError:
                stranger_since = stranger_since or time.monotonic()
                if time.monotonic() - stranger_since > STRANGER_SECONDS:
                    raise
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, 10)

    async def _post(
        self, path: str, body: BaseModel, token: str | None, seconds: float
    ) -> httpx2.Response:
        try:
            return await self._client.post(
                self._address() + PREFIX + path,
                content=body.model_dump_json(),
                headers={
                    "Authorization": f"Bearer {token or self._worker_token()}",
                    "Content-Type": "application/json",
                },
                timeout=httpx2.Timeout(seconds, connect=5),
            )
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None

    def _note(self, trouble: str) -> None:
        """One line when the API goes away, and one when it is back."""
        if bool(trouble) != self._is_away:
            self._is_away = bool(trouble)
            log.warning("the API is away: %s", trouble) if trouble else log.info("the API is back")

    def _address(self) -> str:
        if self._server:
            return self._server.rstrip("/")
        try:
            found = json.loads((self._home / "api.json").read_bytes())
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

"""One webhook message over the wire, as Standard Webhooks has it: signed, bounded, and no further
than to the address that was judged."""

import asyncio
import base64
import hashlib
import hmac
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx2

from tunesmith import VERSION
from tunesmith.addresses import Network, Refused, Resolve, open_addresses, resolve
from tunesmith.errors import BadRequestError
from tunesmith.hub.remote import started

TOTAL_SECONDS = 10.0
CONNECT_SECONDS = 4.0
LAST_WORDS_SECONDS = 1.0
MAX_ANSWER_BYTES = 4096
"""Of an answer's body, read so that the receiver can end in peace, and thrown away."""
MAX_URL_LENGTH = 2048
GONE = 410
_PORTS = {"http": 80, "https": 443}
_TRIED_ADDRESSES = 3
_OPEN_BELOW = 1024


@dataclass(frozen=True)
class Answer:
    status: int | None
    """None where there was no answer."""
    error: str | None
    """Why it counts as not taken."""
    retry_after_seconds: float | None = None


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: str) -> str:
    """The `webhook-signature`: one for each secret, and any of them may match."""
    signed = f"{message_id}.{timestamp}.{body}".encode()
    return " ".join(f"v1,{_hmac(secret, signed)}" for secret in secrets)


def _hmac(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def check_url(text: str, field: str = "url") -> httpx2.URL:
    """Raises BadRequestError for what is no plain http(s) address."""
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, UnicodeError, ValueError):
        raise _bad(field, "it can't be read as a URL") from None
    if url.scheme not in _PORTS:
        raise _bad(field, "it must begin with https:// or http://")
    if not url.host or "%" in url.host:
        raise _bad(field, "it names no host")
    if url.userinfo or "@" in url.netloc.decode("ascii", "replace"):
        raise _bad(field, "a name or a password in it would be shown; leave it out")
    if url.fragment:
        raise _bad(field, "it has a fragment (#…), which is never sent")
    port = _port(url)
    if not 0 < port < 65536 or (port < _OPEN_BELOW and port not in _PORTS.values()):
        raise _bad(field, f"port {port}: give 80, 443, or one from {_OPEN_BELOW} to 65535")
    return url


def _bad(field: str, reason: str) -> BadRequestError:
    return BadRequestError(
        f"{field}: {reason}; right would be https://example.com/hook", param=field
    )


def _port(url: httpx2.URL) -> int:
    return _PORTS[url.scheme] if url.port is None else url.port


class Sender:
    """Posts messages. One a server; it keeps no connection, and follows no redirect."""

    def __init__(
        self,
        listed: Callable[[], Sequence[Network]],
        look_up: Resolve = resolve,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._listed, self._look_up, self._trust = listed, look_up, trust
        self._client: httpx2.AsyncClient | None = None

    async def judge(self, url: httpx2.URL) -> list[str]:
        """The addresses that a URL may be reached at. Raises Refused."""
        host, port, listed = url.host, _port(url), self._listed()
        return await asyncio.wrap_future(
            started(lambda: open_addresses(host, port, listed, self._look_up))
        )

    async def send(self, text: str, secrets: Sequence[str], message_id: str, body: str) -> Answer:
        """One try, within `TOTAL_SECONDS`. Raises nothing."""
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                url = check_url(text)
                addresses = await self.judge(url)
                return await self._send(url, addresses, secrets, message_id, body)
        except BadRequestError as error:
            return Answer(None, error.message)
        except Refused as error:
            return Answer(None, str(error))
        except TimeoutError:
            return Answer(None, f"no answer within {TOTAL_SECONDS:.0f} seconds")

    async def _send(
        self,
        url: httpx2.URL,
        addresses: Sequence[str],
        secrets: Sequence[str],
        message_id: str,
        body: str,
    ) -> Answer:
        failed = "no address"
        for address in addresses[:_TRIED_ADDRESSES]:
            timestamp = int(time.time())
            headers = {
                "host": url.netloc.decode("ascii"),
                "content-type": "application/json",
                "user-agent": f"Tunesmith/{VERSION}",
                "webhook-id": message_id,
                "webhook-timestamp": str(timestamp),
                "webhook-signature": sign(secrets, message_id, timestamp, body),
            }
            try:
                return await self._post(url, address, headers, body)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failed = f"no connection to {address}: {_word(error)}"
            except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
                return Answer(None, f"{address} broke off: {_word(error)}")
        return Answer(None, failed)

    async def _post(
        self, url: httpx2.URL, address: str, headers: dict[str, str], body: str
    ) -> Answer:
        """To one address, while host header, SNI and certificate stay the name's."""
        asking = self._open().stream(
            "POST",
            url.copy_with(host=address),
            headers=headers,
            content=body.encode(),
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        async with asking as response:
            status = response.status_code
            try:
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await _read_some(response)
            except (TimeoutError, httpx2.HTTPError):
                pass  # the answer counts from its first line on
        if response.is_success:
            return Answer(status, None)
        return Answer(status, _reason(status), _retry_after(response.headers.get("retry-after")))

    def _open(self) -> httpx2.AsyncClient:
        if self._client is None:
            self._client = httpx2.AsyncClient(
                timeout=httpx2.Timeout(TOTAL_SECONDS, connect=CONNECT_SECONDS),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
                verify=self._trust or ssl.create_default_context(),
                trust_env=False,
                follow_redirects=False,
            )
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


async def _read_some(response: httpx2.Response) -> None:
    size = 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            return


def _reason(status: int) -> str:
    if 300 <= status < 400:
        return f"the receiver answered {status}; redirects are not followed"
    if status == GONE:
        return "the receiver answered 410 Gone: nothing is sent there any more"
    return f"the receiver answered {status}"


def _retry_after(text: str | None) -> float | None:
    """Seconds, from a number or a date; None for what is neither, or lies in the past."""
    if text is None or len(text) > 100:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        wait = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return wait if wait > 0 else None


def _word(error: Exception) -> str:
    """Of the fault, never of what was sent or answered."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__

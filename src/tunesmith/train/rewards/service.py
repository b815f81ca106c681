"""Completions scored by a service over HTTP: in batches, bounded, asked again where it is away.

The connection goes to an address that was judged, under the name's host header and certificate;
redirects are not followed, proxies of the environment are not used.
"""

import json
import math
import ssl
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Any

import httpx2

from tunesmith import VERSION
from tunesmith.addresses import Network, Refused, open_addresses
from tunesmith.data.asked import asked
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.rewards import RewardService
from tunesmith.train.batches import Interrupted
from tunesmith.train.rewarding import Judged

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
MAX_ANSWER_BYTES = 1 << 20
MOST = 1e9
"""A score is no further from 0."""
_AGAIN = {408, 425, 429}
_PORTS = {"http": 80, "https": 443}
_CONNECT_SECONDS = 10.0
_NAP_SECONDS = 0.2


class _Away(Exception):
    """The service may be there later: why, and when it said so."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class Service:
    """See `Scorer`."""

    def __init__(
        self,
        source: RewardService,
        networks: Sequence[str],
        should_stop: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`should_stop` is looked at while the service is waited for."""
        self._source, self._should_stop, self._sleep = source, should_stop, sleep
        self._networks: list[Network] = [ip_network(one) for one in networks]
        try:
            self._url = httpx2.URL(source.url)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise _failure(f"the reward service's address cannot be read: {error}") from error
        self._trust = ssl.create_default_context()

    def score(self, judged: Sequence[Judged]) -> list[float]:
        """Raises Interrupted at a stop while the service is away."""
        size, found = self._source.batch_size, list[float]()
        with self._open() as client:
            for start in range(0, len(judged), size):
                items = [_item(one) for one in judged[start : start + size]]
                found += self._insist(client, items)
        return found

    def _insist(self, client: httpx2.Client, items: list[dict[str, Any]]) -> list[float]:
        body = json.dumps({"items": items}, ensure_ascii=False).encode("utf-8", "replace")
        pause = FIRST_WAIT_SECONDS
        for left in reversed(range(self._source.tries)):
            if self._should_stop():
                raise Interrupted
            try:
                return _scores(self._ask(client, body), len(items))
            except _Away as away:
                if not left:
                    raise self._gone(away) from away
                self._wait(min(max(pause, away.wait_seconds), LONGEST_WAIT_SECONDS))
                pause *= 2
        raise AssertionError

    def _ask(self, client: httpx2.Client, body: bytes) -> Any:
        """Raises _Away, JobFailure."""
        address, deadline = self._address(), time.monotonic() + self._source.timeout_seconds
        headers = {
            "host": self._url.netloc.decode("ascii"),
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"Tunesmith/{VERSION}",
        }
        asking = client.stream(
            "POST",
            self._url.copy_with(host=address),
            headers=headers,
            content=body,
            extensions={"sni_hostname": self._url.raw_host.decode("ascii")},
        )
        try:
            with asking as response:
                _check_status(response)
                return _parsed(_read(response, deadline))
        except (httpx2.HTTPError, httpx2.InvalidURL, ssl.SSLError, OSError) as error:
            raise _Away(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _address(self) -> str:
        port = self._url.port or _PORTS[self._url.scheme]
        try:
            return open_addresses(self._url.host, port, self._networks)[0]
        except Refused as refused:
            if not refused.is_final:
                raise _Away(str(refused)) from refused
            raise _failure(f"the reward service may not be asked: {refused}") from refused

    def _open(self) -> httpx2.Client:
        seconds = self._source.timeout_seconds
        return httpx2.Client(
            timeout=httpx2.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds)),
            verify=self._trust,
            trust_env=False,
            follow_redirects=False,
        )

    def _wait(self, seconds: float) -> None:
        while seconds > 0:
            if self._should_stop():
                raise Interrupted
            self._sleep(min(seconds, _NAP_SECONDS))
            seconds -= _NAP_SECONDS

    def _gone(self, away: _Away) -> JobFailure:
        return JobFailure(
            FailureClass.DOWNLOAD,
            f"the reward service {self._url.host} did not answer in {self._source.tries} tries: "
            f"{away}",
            "see that the service runs and can be reached from the trainer's host; the job goes on "
            "from its checkpoint",
        )


def _item(one: Judged) -> dict[str, Any]:
    return {
        "prompt": one.prompt,
        "completion": one.completion,
        "reference": asked(one.row).reference,
        "metadata": one.row.metadata,
    }


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if response.is_success:
        return
    if status in _AGAIN or status >= 500:
        told = response.headers.get("retry-after", "")
        is_number = told.isascii() and told.isdigit()
        raise _Away(f"it answered {status}", float(told[:6]) if is_number else 0.0)
    more = "; redirects are not followed" if 300 <= status < 400 else ""
    raise _failure(f"the reward service answered {status}{more}")


def _read(response: httpx2.Response, deadline: float) -> bytes:
    found = bytearray()
    for part in response.iter_raw():
        found += part
        if len(found) > MAX_ANSWER_BYTES:
            raise _failure(f"the reward service answered over {MAX_ANSWER_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise _Away("its answer did not come to an end in time")
    return bytes(found)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _failure("the reward service answered something else than JSON") from None


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        told = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise _failure(f"the reward service answered {told} for {count} completions")
    for score in scores:
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not math.isfinite(score) or abs(score) > MOST:
            raise _failure(
                f"the reward service gave {str(score)[:40]} for a score; a finite number of at "
                f"most {MOST:g} is wanted"
            )
    return [float(score) for score in scores]


def _failure(message: str) -> JobFailure:
    return JobFailure(
        FailureClass.USER_ERROR,
        message,
        'right would be {"scores": [0.5, …]}, one number for each item, with status 200',
    )

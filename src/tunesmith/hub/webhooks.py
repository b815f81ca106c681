"""Webhook endpoints: made, listed, changed, tried, and what they were sent."""

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.addresses import LOOPBACK, Network, Refused
from tunesmith.errors import BadRequestError, RateLimitError
from tunesmith.hub.delivery import Sender, check_url
from tunesmith.hub.principal import Principal
from tunesmith.store import outbox, webhooks
from tunesmith.store.webhooks import Delivery, Endpoint

if TYPE_CHECKING:
    from tunesmith.hub import Hub

MAX_TESTS = 8
"""Tests on their way at once, of all owners."""
_SAMPLE_JOB = "00000000"


class Webhooks:
    """One a server."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._tests = 0
        self.sender = Sender(self.open_networks)

    def open_networks(self) -> Sequence[Network]:
        """Those that the operator lists; and loopback, while only this machine's user can ask."""
        listed = self._hub.settings.webhook_networks
        return (*listed, *LOOPBACK) if self._hub.keys.is_open else listed

    async def make(self, who: Principal, name: str, url: str, types: Sequence[str]) -> Endpoint:
        """Raises BadRequestError: no such type, a URL that is closed, too many."""
        types = _known(types)
        await self.check(url)
        return await self._hub.write(lambda tx: webhooks.make(tx, who.owner, name, url, types))

    def find(self, who: Principal, endpoint_id: str) -> Endpoint:
        return self._hub.store.read(lambda tx: webhooks.find(tx, endpoint_id, who.scope))

    def page(self, who: Principal, after: str | None, limit: int) -> tuple[list[Endpoint], bool]:
        return self._hub.store.read(lambda tx: webhooks.page(tx, who.scope, after, limit))

    async def change(
        self,
        who: Principal,
        endpoint_id: str,
        name: str | None,
        url: str | None,
        types: Sequence[str] | None,
    ) -> Endpoint:
        """What is None stays. Raises NotFoundError, BadRequestError."""
        self.find(who, endpoint_id)
        wanted = None if types is None else _known(types)
        if url is not None:
            await self.check(url)
        return await self._hub.write(
            lambda tx: webhooks.change(
                tx, endpoint_id, who.scope, name=name, url=url, event_types=wanted
            )
        )

    async def rotate(self, who: Principal, endpoint_id: str, should_overlap: bool) -> Endpoint:
        return await self._hub.write(
            lambda tx: webhooks.rotate(tx, endpoint_id, who.scope, should_overlap)
        )

    async def remove(self, who: Principal, endpoint_id: str) -> None:
        await self._hub.write(lambda tx: webhooks.remove(tx, endpoint_id, who.scope))

    async def test(self, who: Principal, endpoint_id: str, kind: str) -> int:
        """Send a sample at once. Returns the receiver's status.

        Raises BadRequestError where there was no answer, RateLimitError.
        """
        endpoint = self.find(who, endpoint_id)
        _known([kind])
        if self._tests >= MAX_TESTS:
            raise RateLimitError("too many tests at once; wait some seconds")
        event_id = "evt_test_" + secrets.token_hex(8)
        body = outbox.body(event_id, int(time.time()), kind, _SAMPLE_JOB)
        self._tests += 1
        try:
            answer = await self.sender.send(endpoint.url, [endpoint.secret], event_id, body)
        finally:
            self._tests -= 1
        if answer.status is None:
            raise BadRequestError(f"the test reached nobody: {answer.error}", param="url")
        return answer.status

    def deliveries(
        self, who: Principal, endpoint_id: str, after: str | None, limit: int
    ) -> tuple[list[Delivery], bool]:
        return self._hub.store.read(
            lambda tx: webhooks.deliveries(tx, endpoint_id, who.scope, after, limit)
        )

    async def redeliver(self, who: Principal, endpoint_id: str, delivery_id: str) -> Delivery:
        return await self._hub.write(
            lambda tx: webhooks.redeliver(tx, endpoint_id, delivery_id, who.scope)
        )

    async def check(self, text: str, field: str = "url") -> None:
        """A name that can't be resolved now may be later; an address that is closed is refused.

        Raises BadRequestError.
        """
        url = check_url(text, field)
        try:
            await self.sender.judge(url)
        except Refused as refused:
            if refused.is_final:
                raise BadRequestError(f"{field}: {refused}", param=field) from None


def _known(types: Sequence[str]) -> list[str]:
    """Each once. Raises BadRequestError for a type that is never sent."""
    known = list(outbox.TYPES.values())
    for kind in types:
        if kind not in known:
            raise BadRequestError(
                f"event_types: {kind[:100]!r} is not sent by this server; known are "
                + ", ".join(known),
                param="event_types",
            )
    return list(dict.fromkeys(types))

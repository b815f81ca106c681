"""What an engine says of itself: that it lives, what it serves, what it counted."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx2

from tunesmith.hub.answers import Target, bearer
from tunesmith.store.engines import Engine

ALIVE_SECONDS = 5.0
"""For an engine to say that it lives, after a connection to it broke."""


async def is_alive(client: httpx2.AsyncClient, target: Target) -> bool:
    try:
        reply = await client.get(target.url + "/health", timeout=ALIVE_SECONDS)
    except httpx2.TransportError:
        return False
    return reply.status_code < 500


async def model_info(client: httpx2.AsyncClient, target: Target) -> dict[str, Any] | None:
    """None of an engine of another make, which has none."""
    headers = bearer(target.key)
    try:
        reply = await client.get(f"{target.url}/model_info", headers=headers, timeout=10)
        return dict(reply.json()) if reply.status_code == 200 else None
    except (httpx2.HTTPError, ValueError, TypeError):
        return None


async def expositions(
    client: httpx2.AsyncClient, ready: Sequence[Engine]
) -> list[tuple[Engine, str]]:
    """What each tells Prometheus; those that tell nothing are left out."""

    async def ask(row: Engine) -> str:
        try:
            reply = await client.get(f"{row.url}/metrics", headers=bearer(row.key), timeout=5)
        except httpx2.HTTPError:
            return ""
        return reply.text if reply.status_code == 200 else ""

    told = await asyncio.gather(*(ask(row) for row in ready))
    return [(row, text) for row, text in zip(ready, told, strict=True) if text]

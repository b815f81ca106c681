"""The API processes that share this database: each writes down now and then that it lives."""

from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.engine import Connection

from tunesmith.store.rows import add_once
from tunesmith.store.tables import now, servers

KEEP_SECONDS = 24 * 3600.0


def seen(tx: Connection, server_id: str, host: dict[str, Any]) -> None:
    known = update(servers).where(servers.c.id == server_id).values(host=host, seen_at=now())
    if not tx.execute(known).rowcount:
        times = {"started_at": now(), "seen_at": now()}
        add_once(tx, servers, {"id": server_id, "host": host, **times})


def others(tx: Connection, server_id: str, within_seconds: float) -> list[dict[str, Any]]:
    """The hosts of other processes that were seen lately."""
    query = select(servers.c.host).where(
        servers.c.id != server_id, servers.c.seen_at >= now() - within_seconds
    )
    return list(tx.scalars(query))


def leave(tx: Connection, server_id: str) -> None:
    tx.execute(delete(servers).where(servers.c.id == server_id))


def sweep(tx: Connection, keep_seconds: float = KEEP_SECONDS) -> int:
    """Forget processes that were not seen for long; returns how many."""
    return tx.execute(delete(servers).where(servers.c.seen_at < now() - keep_seconds)).rowcount

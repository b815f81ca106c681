"""API keys: made and shown once, kept as a hash."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from sqlalchemy import insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import NotFoundError
from tunesmith.spec.scopes import Scope
from tunesmith.spec.strict import Strict
from tunesmith.store.rows import clean
from tunesmith.store.tables import api_keys, now

MAX_KEY_LENGTH = 512


class Key(Strict):
    id: str
    hint: str
    """The first letters, enough to tell keys apart."""
    owner: str
    name: str
    created_at: float
    revoked_at: float | None
    is_worker: bool = False
    """Opens the workers' routes, and nothing else."""
    scopes: tuple[Scope, ...] | None = None
    """What it opens; None: everything."""


def make(
    tx: Connection,
    owner: str,
    name: str = "",
    is_worker: bool = False,
    scopes: Sequence[Scope] | None = None,
) -> tuple[Key, str]:
    """A new key; its text is known only here and now."""
    text = "sk-" + secrets.token_urlsafe(32)
    row = {
        "id": "key-" + secrets.token_hex(6),
        "sha256": _hash(text),
        "hint": text[:8] + "…",
        "owner": clean(owner),
        "name": clean(name),
        "is_worker": is_worker,
        "scopes": None if scopes is None else list(scopes),
    }
    tx.execute(insert(api_keys).values(**row, created_at=now()))
    found = tx.execute(select(api_keys).where(api_keys.c.id == row["id"])).mappings().one()
    return _to_key(found), text


def list_keys(tx: Connection) -> list[Key]:
    """All of them, revoked ones too, oldest first."""
    query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
    return [_to_key(row) for row in tx.execute(query).mappings()]


def revoke(tx: Connection, key_id: str) -> Key:
    """Raises NotFoundError; a key that was revoked before stays so."""
    tx.execute(
        update(api_keys)
        .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        .values(revoked_at=now())
    )
    row = tx.execute(select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"no key {clean(key_id)[:100]!r}; tunesmith keys ls shows them")
    return _to_key(row)


def find(tx: Connection, presented: str) -> Key | None:
    """The key that `presented` is, unless it was revoked."""
    if len(presented) > MAX_KEY_LENGTH:
        return None
    digest = _hash(presented)
    query = select(api_keys).where(api_keys.c.sha256 == digest, api_keys.c.revoked_at.is_(None))
    row = tx.execute(query).mappings().first()
    if row is None or not hmac.compare_digest(row["sha256"], digest):
        return None
    return _to_key(row)


def has_any(tx: Connection) -> bool:
    """Whether a user's key was ever made: then every request wants one."""
    query = select(api_keys.c.id).where(api_keys.c.is_worker.is_(False)).limit(1)
    return tx.scalar(query) is not None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _to_key(row: RowMapping) -> Key:
    return Key.model_validate({name: row[name] for name in Key.model_fields})

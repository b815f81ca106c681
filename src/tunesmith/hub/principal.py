"""Who a request comes from, and what of the house they see."""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from tunesmith.spec.scopes import SCOPES, Scope

TEST_KEYS = {"test-key-001": "test-key-001", "test-key-002": "test-key-002"}
"""Key → owner: good on loopback until the operator makes the first key."""
LOCAL_OWNER = "test-key-001"


@dataclass(frozen=True)
class Principal:
    owner: str
    sees_all: bool = False
    is_operator: bool = False
    is_worker: bool = False
    """A host that trains: the workers' routes are open to it, and no other."""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    """What else is open to it."""

    @classmethod
    def local(cls) -> "Principal":
        """Whoever sits at this machine before the first key is made."""
        return cls(LOCAL_OWNER, sees_all=True)

    @property
    def scope(self) -> str | None:
        """The owner that queries are limited to; None for all."""
        return None if self.sees_all else self.owner


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether only this machine is meant: a name or an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

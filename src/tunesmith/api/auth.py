"""Who is asking: a key, or nobody on the machine's own loopback before the first key was made.

Every route declares one of three dependencies: `Anyone` for the open ones, `Caller` where a
loopback caller may come without a key, `KeyHolder` where a key is always wanted. A wrong key is 401
on all of them but the open ones.
"""

import hashlib
import re
from typing import Annotated

from fastapi import Depends, Request

from tunesmith.api.deps import HubDep
from tunesmith.errors import AuthenticationError, PermissionError
from tunesmith.hub import Hub
from tunesmith.hub.principal import Principal, is_loopback
from tunesmith.spec.scopes import Scope

LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.]+)(:\d{1,5})?", re.IGNORECASE)
INFERENCE = frozenset(
    (
        *("/generate", "/chat", "/model_info", "/metrics"),
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
    )
)
_FORWARDED = ("forwarded", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "via")


async def anyone() -> None:
    """The route is open: health, docs."""


async def caller(request: Request, hub: HubDep) -> Principal:
    """A key holder, or, on loopback before the first key, whoever sits at this machine."""
    key = presented_key(request)
    if key is not None:
        return _holder(request, hub, key)
    if hub.keys.is_open and is_local(request, hub):
        return Principal.local()
    raise AuthenticationError("a key is wanted: send Authorization: Bearer sk-… or X-API-Key")


async def key_holder(request: Request, hub: HubDep) -> Principal:
    key = presented_key(request)
    if key is None:
        raise AuthenticationError("a key is wanted: send Authorization: Bearer sk-…")
    return _holder(request, hub, key)


async def operator(request: Request, hub: HubDep) -> Principal:
    """The workspace's own token (`.tunesmith/worker.token`), or an operator's key."""
    principal = await key_holder(request, hub)
    if not principal.is_operator:
        raise PermissionError("this route is the operator's")
    return principal


async def worker(request: Request, hub: HubDep) -> Principal:
    """A host that trains: a worker's key, or what an operator may show."""
    key = presented_key(request)
    if key is None:
        raise AuthenticationError("a worker's key is wanted: send Authorization: Bearer sk-…")
    principal = _known(request, hub, key)
    if not (principal.is_worker or principal.is_operator):
        raise PermissionError(
            "this route is for workers; make a key for one: tunesmith keys create --worker"
        )
    return principal


Anyone = Annotated[None, Depends(anyone)]
Caller = Annotated[Principal, Depends(caller)]
KeyHolder = Annotated[Principal, Depends(key_holder)]
Operator = Annotated[Principal, Depends(operator)]
Worker = Annotated[Principal, Depends(worker)]


def presented_key(request: Request) -> str | None:
    bearer = request.headers.get("authorization")
    if bearer is not None:
        scheme, _, key = bearer.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("the Authorization header must read: Bearer <key>")
        return key.strip()
    return request.headers.get("x-api-key")


async def pace(request: Request, hub: Hub) -> None:
    """A request that makes an engine work: raises RateLimitError where there were too many."""
    key = presented_key(request)
    client = request.client.host if request.client else "unknown"
    await hub.rates.spend(client if key is None else hashlib.sha256(key.encode()).hexdigest())


def is_local(request: Request, hub: Hub) -> bool:
    """Peer and Host are loopback, nothing was forwarded, and no foreign page is behind it."""
    peer = request.client.host if request.client else ""
    if not (is_loopback(peer) and _is_loopback_host(request.headers.get("host", ""))):
        return False
    if any(name in _FORWARDED or name.startswith("x-forwarded-") for name in request.headers):
        return False
    origins = request.headers.getlist("origin")
    return all(is_known_origin(origin, hub.settings.cors_origins) for origin in origins)


def _is_loopback_host(host: str) -> bool:
    """A Host header in whole: an address or `localhost`, with or without a port."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].strip("[]").lower())


def is_known_origin(origin: str, configured: tuple[str, ...]) -> bool:
    return origin in configured or re.fullmatch(LOOPBACK_ORIGIN, origin) is not None


def _holder(request: Request, hub: Hub, key: str) -> Principal:
    principal = _known(request, hub, key)
    if principal.is_worker:
        raise PermissionError("this is a worker's key; it opens the workers' routes only")
    wanted = scope_of(request.url.path)
    if wanted is not None and wanted not in principal.scopes:
        raise PermissionError(f"this key does not open this: it lacks the scope {wanted!r}")
    return principal


def scope_of(path: str) -> Scope | None:
    """What a key must have to come in there; None where any will do."""
    if path.startswith("/v1/models"):
        return None
    if path == "/load_model":
        return "load"
    return "infer" if path in INFERENCE else "train"


def _known(request: Request, hub: Hub, key: str) -> Principal:
    principal = hub.keys.find(key, is_local=is_local(request, hub))
    if principal is None:
        raise AuthenticationError("that key is not known here, or no longer")
    return principal

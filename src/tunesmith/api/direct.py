"""Routes that are asked thousands of times a second: called without FastAPI's own machinery.

FastAPI documents them and its fields check what comes in, so that errors read the same; what it
does around that for any kind of endpoint costs more than the endpoint.
"""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.dependencies.utils import request_params_to_args
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import URLPath
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from tunesmith.api.deps import get_hub, hub_of
from tunesmith.api.strict import StrictRequest, StrictRoute

Endpoint = Callable[..., Coroutine[Any, Any, Response]]


class DirectRoute(StrictRoute):
    """Its endpoint is a coroutine that makes its own Response, from one JSON body and headers; of
    dependencies it has the hub and the doors of its router."""

    def inner_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Endpoint = self.endpoint
        told = self.dependant
        assert not told.query_params + told.path_params + told.cookie_params
        (field,) = told.body_params
        body: TypeAdapter[Any] = TypeAdapter(field.field_info.annotation or Any)
        headers = [(header.alias.encode(), header) for header in told.header_params]
        needed = [(need.name, need.call) for need in told.dependencies if need.name and need.call]

        async def directly(request: Request) -> Response:
            assert isinstance(request, StrictRequest)
            sent = {name for name, _ in request.headers.raw}
            present = [header for alias, header in headers if alias in sent]
            values, faults = request_params_to_args(present, request.headers)
            values[field.name] = await _body(request, body, faults)
            if faults:
                raise RequestValidationError(faults)
            for name, call in needed:
                values[name] = hub_of(request) if call is get_hub else request.admitted[call]
            return await endpoint(**values)

        return directly


async def _body(request: StrictRequest, body: TypeAdapter[Any], faults: list[Any]) -> Any:
    """What was asked for; what is wrong with it is added to `faults`, as FastAPI words it."""
    if not await request.body():
        missing = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}
        faults.append(missing)
        return None
    try:
        return body.validate_python(await request.json())
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            faults.append({**fault, "loc": ("body", *fault["loc"])})
    return None


def put_in_front(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Let the direct routes of routers that `app` includes be found before all others."""
    for router in routers:
        for route in router.routes:
            if isinstance(route, DirectRoute):
                app.router.routes.insert(0, _Front(route))


class _Front(BaseRoute):
    """A direct route, found by comparing two strings. Under a root path FastAPI's way is taken."""

    def __init__(self, route: DirectRoute) -> None:
        self.path, self._methods = route.path, route.methods or set()
        self._handler = route.get_route_handler()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        is_it = scope["type"] == "http" and scope["path"] == self.path
        return (Match.FULL if is_it and scope["method"] in self._methods else Match.NONE), {
            "route": self
        }

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)

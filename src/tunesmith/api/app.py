"""One application: the contracts over one hub, with one shape of error each."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith import VERSION
from tunesmith.api import faults, operator, transfer, workers
from tunesmith.api.auth import LOOPBACK_ORIGIN
from tunesmith.api.counted import Counted
from tunesmith.api.direct import put_in_front
from tunesmith.api.families import (
    configured,
    data,
    events,
    health,
    inference,
    metrics,
    openai,
    training,
    uploads,
    webhooks,
)
from tunesmith.api.feed import Feeds
from tunesmith.api.leaving import InFlight, Leaving
from tunesmith.api.stream import Watcher
from tunesmith.hub import Hub
from tunesmith.hub.sweep import sweep

TRAINING_ROLE = (training.router, configured.router, uploads.router, data.router, events.router)
ALL_ROLE = (*TRAINING_ROLE, inference.router, openai.router, webhooks.router)


def create_app(hub: Hub, role: str = "all") -> FastAPI:
    """The application over an open hub; `role` "training" leaves the inference routes out."""
    app: FastAPI = FastAPIOffline(
        title="Tunesmith",
        version=VERSION,
        description="Fine-tuning on your own machines: submit, follow, chat with the result.",
        lifespan=_lifespan,
    )
    app.state.hub = hub
    faults.install(app)
    for router in (health.router, metrics.router, *(ALL_ROLE if role == "all" else TRAINING_ROLE)):
        app.include_router(router)
    app.include_router(workers.router)
    app.include_router(transfer.router)
    app.include_router(operator.router)
    put_in_front(app, TRAINING_ROLE)
    app.state.in_flight = InFlight()
    app.add_middleware(Leaving, in_flight=app.state.in_flight)
    app.add_middleware(RequestId)
    app.add_middleware(Counted)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(hub.settings.cors_origins),
        allow_origin_regex=LOOPBACK_ORIGIN,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    hub: Hub = app.state.hub
    watcher = Watcher()
    app.state.watcher = watcher
    app.state.feeds = Feeds(hub.store, watcher, hub.settings.max_streams)
    hub.store.on_commit(watcher.notify)
    await workers.attempt_to(asyncio.to_thread(sweep, hub))  # before anything new comes in
    async with hub.running(watcher):
        keeper = asyncio.create_task(workers.keep_house(hub))
        yield
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


class RequestId:
    """Each answer carries an `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(
                    "x-request-id", f"req-{random.getrandbits(128):032x}"
                )
            await send(message)

        await self.app(scope, receive, marked)


def __getattr__(name: str) -> ASGIApp:
    """`app`, for `uvicorn tunesmith.api.app:app`. See `opened`."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tunesmith.api.opened import Opened  # which imports this module

    return Opened()

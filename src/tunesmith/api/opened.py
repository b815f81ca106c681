"""The application for whatever ASGI server: `uvicorn tunesmith.api.app:app`, several processes too.

Nothing is opened by importing it. The workspace is opened when the server starts, in each of its
processes, and closed when it ends; settings come from the environment.
"""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.api.app import create_app
from tunesmith.api.leaving import heard
from tunesmith.errors import TuningAPIError
from tunesmith.hub import Hub
from tunesmith.settings import Settings


class Opened:
    """Needs a server that speaks ASGI's lifespan protocol, as they all do."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        assert self._app is not None, "the server did not announce its start (lifespan)"
        await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            hub = await asyncio.to_thread(lambda: Hub.open(Settings.read()))
        except (TuningAPIError, ValueError) as refusal:  # ValueError: of settings
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(refusal)})
            return
        with hub:
            app = self._app = create_app(hub)

            def end() -> None:
                app.state.watcher.close()
                asyncio.get_running_loop().call_later(
                    hub.settings.drain_seconds, app.state.in_flight.cut
                )

            with heard(end):
                await app(scope, receive, send)

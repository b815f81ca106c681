"""The engine's HTTP surface: the inference contract, OpenAI's routes, adapters by name."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from tunesmith import VERSION
from tunesmith.exposition import CONTENT_TYPE, exposition
from tunesmith.infer import faults, gauges
from tunesmith.infer.completions import add_completions
from tunesmith.infer.door import Door
from tunesmith.infer.embeddings import add_embeddings
from tunesmith.infer.house import House
from tunesmith.infer.lora import add_adapters
from tunesmith.infer.routes import add_contract
from tunesmith.rates import Rates
from tunesmith.settings import Settings


def make_app(house: House, settings: Settings, is_public: bool = False) -> FastAPI:
    """The app of one engine process. Its lifespan starts and ends the engine's thread.

    `is_public`: whoever asks is no API of ours, so there are docs, rates, and pages that may ask.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        house.open()
        yield
        house.close()

    app = _documented(lifespan) if is_public else _plain(lifespan)
    origins = settings.cors_origins if is_public else ()
    rates = Rates(settings.rate_limit if is_public else "", settings.rate_limit_storage)
    app.add_middleware(Door, keyring=house.keyring, rates=rates, origins=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    faults.install(app)
    add_completions(app, house)
    add_embeddings(app, house)
    add_contract(app, house)
    add_adapters(app, house)
    _add_descriptions(app, house)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        gauges.look(house.now)
        return Response(exposition(settings.multiproc_dir), media_type=CONTENT_TYPE)

    return app


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def _plain(lifespan: Lifespan) -> FastAPI:
    return FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)


def _documented(lifespan: Lifespan) -> FastAPI:
    from fastapi_offline import FastAPIOffline

    title = "Tunesmith: inference"
    app: FastAPI = FastAPIOffline(title=title, version=VERSION, lifespan=lifespan)
    return app


def _add_descriptions(app: FastAPI, house: House) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        if house.served is None:
            nothing = {"model_loaded": False, "model_name": None, "device": None}
            return {"status": "healthy", **nothing, "pid": os.getpid()}
        served = house.served
        scheduler = served.engine.scheduler
        return {
            "status": "healthy",
            "model_loaded": True,
            "model_name": served.model_name,
            "device": served.engine.runner.model.shape.device,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "steps": served.engine.steps,
            "cache_blocks_free": scheduler.available_blocks,
            "cache_blocks": served.engine.limits.blocks,
            "pid": os.getpid(),
        }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        if house.served is None:
            return {"object": "list", "data": []}
        served = await house.take(request)
        length = served.engine.context_length
        return {"object": "list", "data": [each.wire(length) for each in served.voices.all()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        served = await house.take(request)
        return served.voices.get(name).wire(served.engine.context_length)

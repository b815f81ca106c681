"""The engine's HTTP surface: the inference contract, OpenAI's routes, adapters by name."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from tunesmith.infer import faults
from tunesmith.infer.completions import add_completions
from tunesmith.infer.door import Door
from tunesmith.infer.house import House
from tunesmith.infer.lora import add_adapters
from tunesmith.infer.routes import add_contract


def make_app(house: House) -> FastAPI:
    """The app of one engine process. Its lifespan starts and ends the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        house.open()
        yield
        house.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Door, key=house.key)
    faults.install(app)
    add_completions(app, house)
    add_contract(app, house)
    add_adapters(app, house)
    _add_descriptions(app, house)
    return app


def _add_descriptions(app: FastAPI, house: House) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        if house.served is None:
            return {"status": "healthy", "model_loaded": False, "model_name": None, "device": None}
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
            "cache_blocks_free": scheduler.free_blocks,
            "cache_blocks": served.engine.limits.blocks,
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

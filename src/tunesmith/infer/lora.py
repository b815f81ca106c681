"""Adapters by name, loaded and unloaded while their base is served: vLLM's two routes."""

import asyncio
from pathlib import Path

from fastapi import FastAPI, Request
from pydantic import Field

from tunesmith.errors import BadRequestError, ConflictError
from tunesmith.infer.body import read_json, validate
from tunesmith.infer.house import House, Served
from tunesmith.infer.voices import Voice, renderer_of
from tunesmith.infer.wire import Wire


class LoadAdapter(Wire):
    lora_name: str = Field(min_length=1, max_length=512)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadAdapter(Wire):
    lora_name: str = Field(min_length=1, max_length=512)


def add_adapters(app: FastAPI, house: House) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> dict[str, str]:
        asked = validate(LoadAdapter, await read_json(request, house.max_body_bytes))
        _refuse_several(house)
        served = await house.take(request)
        async with served.loading:
            if asked.lora_name in served.voices:
                raise BadRequestError(
                    f"the name {asked.lora_name!r} is taken", param="lora_name", error_code="taken"
                )
            served.voices.add(await _load_adapter(served, asked.lora_name, Path(asked.lora_path)))
        return {"status": "success", "message": f"the adapter {asked.lora_name!r} is loaded"}

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> dict[str, str]:
        asked = validate(UnloadAdapter, await read_json(request, house.max_body_bytes))
        _refuse_several(house)
        served = await house.take(request)
        async with served.loading:
            voice = served.voices.get(asked.lora_name)
            if voice.adapter is None or voice.name == served.model_name:
                raise ConflictError(f"{asked.lora_name!r} is what the engine was started for")
            served.voices.remove(voice.name)
            await served.engine.unload_adapter(voice.adapter)
        return {"status": "success", "message": f"the adapter {asked.lora_name!r} is unloaded"}


async def _load_adapter(served: Served, name: str, folder: Path) -> Voice:
    renderer = await asyncio.to_thread(renderer_of, folder, served.base.renderer)
    await served.engine.load_adapter(name, folder)
    return Voice.of(name, folder, renderer, adapter=name, parent=served.base.name)


def _refuse_several(house: House) -> None:
    if house.fellows is not None:
        raise ConflictError(
            "this server has several processes, and an adapter would reach one of them; load it "
            "as the model with /load_model, or serve with one process"
        )

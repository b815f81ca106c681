"""The inference contract on the engine itself: generate, chat, what is loaded, load another."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import torch
from fastapi import FastAPI, Query, Request, Response
from starlette.responses import JSONResponse

from tunesmith.errors import BadRequestError, NotFoundError
from tunesmith.infer import contract
from tunesmith.infer.body import read_json
from tunesmith.infer.completions import chat as answer_chat
from tunesmith.infer.completions import complete
from tunesmith.infer.contract import Chat, Generate, Reply, precision_of
from tunesmith.infer.house import House, Served
from tunesmith.infer.loading import Wanted
from tunesmith.infer.streams import EventStream, to_json

Asked = TypeVar("Asked", Generate, Chat)
_QUANTIZATIONS = {"int8": "8bit", "int4": "4bit"}


def add_contract(app: FastAPI, house: House) -> None:
    @app.post("/generate", openapi_extra=contract.described(Generate))
    async def generate(request: Request) -> Response:
        """Go on with a text."""
        return await _answer(house, request, Generate)

    @app.post("/chat", openapi_extra=contract.described(Chat))
    async def chat(request: Request) -> Response:
        """Answer an instruction, or a conversation."""
        return await _answer(house, request, Chat)

    @app.get("/model_info")
    async def model_info(request: Request) -> dict[str, Any]:
        return describe(await house.take(request))

    @app.post("/load_model")
    async def load_model(
        model_path: str = Query(min_length=1, max_length=4096),
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
    ) -> dict[str, str]:
        """Serve another model; requests under way end with the one they began with."""
        precision = precision_of(load_in_8bit, load_in_4bit)
        path = _place(model_path)
        served = await house.load(Wanted(path, path.name, precision))
        return contract.loaded(served.model_name, str(path))


def _place(told: str) -> Path:
    """Raises NotFoundError for what can be no path at all."""
    try:
        path = Path(told).expanduser().resolve()
        path.exists()
    except (ValueError, OSError, RuntimeError):
        raise NotFoundError(f"no model at {told[:300]!r}", param="model_path") from None
    return path


async def _answer(house: House, request: Request, kind: type[Asked]) -> Response:
    try:
        asked = kind.model_validate(await read_json(request, house.max_body_bytes))
    except BadRequestError as error:
        fault = {"loc": ["body"], "msg": error.message, "type": "json_invalid"}
        return JSONResponse({"detail": [fault]}, 422)
    except pydantic.ValidationError as error:
        return JSONResponse({"detail": contract.faults(error)}, 422)
    served = await house.take(request)
    reply = Reply(asked, asked.model or served.model_name)
    ask = complete if kind is Generate else answer_chat
    answer = await ask(served, request, asked.body(reply.model_name))
    if isinstance(answer, EventStream):
        return EventStream(_frames(reply, answer))
    told = reply.whole(json.loads(bytes(answer.body)))
    return Response(to_json(told), media_type="application/json")


async def _frames(reply: Reply, answer: EventStream) -> AsyncGenerator[bytes, None]:
    async with aclosing(answer.source) as source, aclosing(reply.frames(source)) as frames:
        async for frame in frames:
            yield frame


def describe(served: Served) -> dict[str, Any]:
    """`GET /model_info`."""
    shape = served.engine.runner.model.shape
    return {
        "model_name": served.model_name,
        "model_path": str(served.wanted.path),
        "device": shape.device,
        "gpu_memory_allocated": gigabytes(torch.cuda.memory_allocated()),
        "gpu_memory_reserved": gigabytes(torch.cuda.memory_reserved()),
        "quantization": _QUANTIZATIONS.get(shape.precision),
        "dtype": shape.dtype,
        "parameters": shape.parameters,
        "context_length": served.engine.context_length,
        "adapters": [each.name for each in served.voices.all() if each.adapter],
    }


def gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GB"

"""The engine's HTTP surface: OpenAI's routes, health, and adapters by name."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.types import Send

from tunesmith.errors import BadRequestError, ConflictError, NotFoundError, TuningAPIError
from tunesmith.infer import openai
from tunesmith.infer.body import read_json, validate
from tunesmith.infer.chat import Piece, ask, fit, read_messages, read_text, reply
from tunesmith.infer.door import Door, error_body, error_response
from tunesmith.infer.engine import Ask, Engine
from tunesmith.infer.voices import Voice, Voices, renderer_of
from tunesmith.spec.chat import MODEL_HEADER

log = logging.getLogger(__name__)
T = TypeVar("T")
_to_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class House:
    """All that the routes share."""

    engine: Engine
    base: Voice
    """Named in no request where an adapter alone was asked for, but kept for later ones."""
    voices: Voices
    model_name: str
    """The name that the engine was started with."""
    key: str = ""
    max_body_bytes: int = 16 << 20


def make_app(house: House) -> FastAPI:
    """The app of one engine process. Its lifespan starts and ends the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        house.engine.start(asyncio.get_running_loop())
        yield
        house.engine.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Door, key=house.key)
    app.add_exception_handler(TuningAPIError, _show_error)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(ClientGone, _show_gone)
    app.add_exception_handler(Exception, _show_fault)
    _add_completions(app, house)
    _add_adapters(app, house)
    _add_descriptions(app, house)
    return app


def _add_completions(app: FastAPI, house: House) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, house.max_body_bytes)
        openai.refuse_unsupported(body, openai.ChatRequest)
        asked = validate(openai.ChatRequest, body)
        voice = house.voices.get(asked.model)
        messages = [each.message() for each in asked.messages]
        prompt = await read_messages(voice, messages, house.engine)
        default = openai.DEFAULT_CHAT_TOKENS
        room = fit(prompt, asked.asked_tokens, default, house.engine, "messages")
        asks = [ask(voice, prompt, asked.sampling(room), asked.count)]
        return await _answer(house, request, asked, voice, asks)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_json(request, house.max_body_bytes)
        openai.refuse_unsupported(body, openai.CompletionRequest)
        asked = validate(openai.CompletionRequest, body)
        if len(asked.prompt) * asked.count > openai.MAX_SEQUENCES:
            raise BadRequestError(
                f"prompts times n is {len(asked.prompt) * asked.count}; "
                f"at most {openai.MAX_SEQUENCES}",
                param="n",
            )
        voice = house.voices.get(asked.model)
        asks = []
        for given in asked.prompt:
            prompt = await _ids(house, voice, given)
            default = openai.DEFAULT_COMPLETION_TOKENS
            room = fit(prompt, asked.max_tokens, default, house.engine, "prompt")
            asks.append(ask(voice, prompt, asked.sampling(room), asked.count))
        return await _answer(house, request, asked, voice, asks)


async def _ids(house: House, voice: Voice, given: str | list[int]) -> list[int]:
    if isinstance(given, str):
        return await read_text(voice, given, house.engine)
    vocabulary = house.engine.runner.model.shape.vocabulary
    if given and max(given) >= vocabulary:
        raise BadRequestError(
            f"token id {max(given)} is not in the vocabulary of {vocabulary}", param="prompt"
        )
    return given


async def _answer(
    house: House, request: Request, asked: openai.Options, voice: Voice, asks: list[Ask]
) -> Response:
    """Run the asks; whole or as a stream. The first token comes before the status does."""
    request.state.usage = usage = openai.Usage(sum(len(each.prompt) for each in asks))
    is_chat = isinstance(asked, openai.ChatRequest)
    name = unquote(request.headers.get(MODEL_HEADER, "")) or asked.model
    form = openai.Form.new(request.state.id, name, is_chat)
    stream = await house.engine.open(asks)
    pieces = reply(stream, voice.renderer.tokenizer)
    try:
        if asked.stream:
            first = await _unless_gone(request, anext(pieces))
            return EventStream(_frames(form, first, pieces, usage, asked.has_usage_chunk))
        return await _unless_gone(request, _whole(form, pieces, len(stream.sequences), usage))
    except BaseException:
        stream.close()
        raise


async def _whole(
    form: openai.Form, pieces: AsyncGenerator[Piece, None], count: int, usage: openai.Usage
) -> Response:
    texts: list[list[str]] = [[] for _ in range(count)]
    finishes = ["stop"] * count
    async for piece in pieces:
        usage.completion_tokens += 1
        texts[piece.index].append(piece.delta.text)
        finishes[piece.index] = piece.delta.finish or "stop"
    body = form.whole(["".join(each) for each in texts], finishes, usage)
    return Response(_to_json(body), media_type="application/json")


async def _frames(
    form: openai.Form,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    usage: openai.Usage,
    has_usage_chunk: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a chunk for each piece of text, and what ends the stream."""
    opened: set[int] = set()
    async with aclosing(pieces):
        try:
            async for piece in _after(first, pieces):
                usage.completion_tokens += 1
                if form.is_chat and piece.index not in opened:
                    opened.add(piece.index)
                    yield _frame(form.first(piece.index))
                if piece.delta.text or piece.delta.finish:
                    yield _frame(form.piece(piece.index, piece.delta.text, piece.delta.finish))
        except TuningAPIError as error:
            yield _frame(error_body(error))
            return
        if has_usage_chunk:
            yield _frame(form.usage(usage))
        yield b"data: [DONE]\n\n"


async def _after(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


def _frame(body: dict[str, Any]) -> bytes:
    return b"data: " + _to_json(body) + b"\n\n"


class EventStream(StreamingResponse):
    """Closes its source as soon as the client has gone, and not when it is collected."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self._source = source

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._source):
            await super().stream_response(send)


class ClientGone(Exception):
    """Nobody is left to answer."""


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it when the client hangs up. Raises ClientGone then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class LoadAdapter(openai.Wire):
    lora_name: str = Field(min_length=1, max_length=512)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadAdapter(openai.Wire):
    lora_name: str = Field(min_length=1, max_length=512)


def _add_adapters(app: FastAPI, house: House) -> None:
    loading = asyncio.Lock()

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> dict[str, str]:
        asked = validate(LoadAdapter, await read_json(request, house.max_body_bytes))
        async with loading:
            if asked.lora_name in house.voices:
                raise BadRequestError(
                    f"the name {asked.lora_name!r} is taken", param="lora_name", error_code="taken"
                )
            house.voices.add(await _load_adapter(house, asked.lora_name, Path(asked.lora_path)))
        return {"status": "success", "message": f"the adapter {asked.lora_name!r} is loaded"}

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> dict[str, str]:
        asked = validate(UnloadAdapter, await read_json(request, house.max_body_bytes))
        async with loading:
            voice = house.voices.get(asked.lora_name)
            if voice.adapter is None or voice.name == house.model_name:
                raise ConflictError(f"{asked.lora_name!r} is what the engine was started for")
            house.voices.remove(voice.name)
            await house.engine.unload_adapter(voice.adapter)
        return {"status": "success", "message": f"the adapter {asked.lora_name!r} is unloaded"}


async def _load_adapter(house: House, name: str, folder: Path) -> Voice:
    renderer = await asyncio.to_thread(renderer_of, folder, house.base.renderer)
    await house.engine.load_adapter(name, folder)
    return Voice.of(name, folder, renderer, adapter=name, parent=house.base.name)


def _add_descriptions(app: FastAPI, house: House) -> None:
    shape = house.engine.runner.model.shape

    @app.get("/health")
    async def health() -> dict[str, Any]:
        scheduler = house.engine.scheduler
        return {
            "status": "healthy",
            "model_loaded": True,
            "model_name": house.model_name,
            "device": shape.device,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "steps": house.engine.steps,
            "cache_blocks_free": scheduler.free_blocks,
            "cache_blocks": house.engine.limits.blocks,
        }

    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        return {
            "model_name": house.model_name,
            "model_path": str(house.voices.get(house.model_name).folder),
            "device": shape.device,
            "gpu_memory_allocated": gigabytes(torch.cuda.memory_allocated()),
            "gpu_memory_reserved": gigabytes(torch.cuda.memory_reserved()),
            "quantization": None,
            "dtype": shape.dtype,
            "parameters": shape.parameters,
            "context_length": house.engine.context_length,
            "adapters": [each.name for each in house.voices.all() if each.adapter],
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        length = house.engine.context_length
        return {"object": "list", "data": [each.wire(length) for each in house.voices.all()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return house.voices.get(name).wire(house.engine.context_length)


def gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GB"


async def _show_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TuningAPIError)
    return error_response(error)


async def _show_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in the one shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFoundError(f"no route {request.url.path[:200]!r}"))
    shown = TuningAPIError(
        f"{request.method} is not allowed here" if error.status_code == 405 else str(error.detail),
        error.status_code,
        "invalid_request_error",
        "method_not_allowed" if error.status_code == 405 else "http_error",
    )
    return error_response(shown)


async def _show_gone(_: Request, error: Exception) -> Response:
    """Written into the log as 499; nobody reads it."""
    return Response(status_code=499)


async def _show_fault(request: Request, error: Exception) -> Response:
    log.error("request %s failed", request.state.id, exc_info=error)
    return error_response(TuningAPIError("the engine failed; its log has more"))

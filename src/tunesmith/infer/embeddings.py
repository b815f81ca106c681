"""OpenAI's embeddings: texts in, vectors of length one out."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response
from pydantic import BeforeValidator, Field
from torch import Tensor

from tunesmith.errors import BadRequestError
from tunesmith.infer import refused
from tunesmith.infer.answers import Usage
from tunesmith.infer.body import read_json, validate
from tunesmith.infer.chat import fit, in_reader
from tunesmith.infer.completions import ids_of
from tunesmith.infer.engine import Ask
from tunesmith.infer.house import House, Served
from tunesmith.infer.openai import Ids, Text, as_prompts
from tunesmith.infer.pooling import Pooled, Pooling, own_pooling
from tunesmith.infer.streams import to_json, unless_gone
from tunesmith.infer.voices import Voice
from tunesmith.infer.wire import Wire
from tunesmith.spec.chat import MODEL_HEADER, Sampling

MAX_INPUTS = 2048
_AT_ONCE = 32
"""Texts of one request in the engine's line: others come between."""
_READ_ONLY = Sampling(max_tokens=0)


class EmbeddingRequest(Wire):
    model: str = Field(min_length=1, max_length=512)
    input: Annotated[
        list[Text | Ids],
        Field(min_length=1, max_length=MAX_INPUTS),
        BeforeValidator(as_prompts),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=1 << 20)
    """The vector's first so many, made of length one again."""
    x_pooling: Literal["mean", "last"] | None = None
    """Instead of what the model's folder says."""


def add_embeddings(app: FastAPI, house: House) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await read_json(request, house.max_body_bytes)
        return await embed(await house.take(request), request, body)


async def embed(served: Served, request: Request, given: dict[str, Any]) -> Response:
    refused.refuse(given, refused.EMBEDDINGS)
    asked = validate(EmbeddingRequest, given)
    voice = served.voices.get(asked.model)
    prompts: list[list[int]] = []
    for text in asked.input:
        prompts.append(await ids_of(served, voice, text, "input"))
        fit(prompts[-1], 0, 0, served.engine, "input")
    request.state.usage = usage = Usage(sum(map(len, prompts)))
    pooling = asked.x_pooling or own_pooling(voice.folder)
    vectors = await unless_gone(request, _vectors(served, voice, prompts, pooling, asked))
    name = unquote(request.headers.get(MODEL_HEADER, "")) or asked.model
    body = await in_reader(lambda: to_json(_told(vectors, asked, name, usage)))
    return Response(body, media_type="application/json")


def _told(
    vectors: Sequence[Tensor], asked: EmbeddingRequest, name: str, usage: Usage
) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": at, "embedding": _written(vector, asked)}
            for at, vector in enumerate(vectors)
        ],
        "model": name,
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }


async def _vectors(
    served: Served,
    voice: Voice,
    prompts: Sequence[list[int]],
    pooling: Pooling,
    asked: EmbeddingRequest,
) -> list[Tensor]:
    vectors: list[Tensor] = []
    for at in range(0, len(prompts), _AT_ONCE):
        readers = await _read(served, voice, prompts[at : at + _AT_ONCE], pooling)
        vectors += [each.vector(asked.dimensions) for each in readers]
    width = len(vectors[0])
    if asked.dimensions is not None and width < asked.dimensions:
        raise BadRequestError(
            f"dimensions is {asked.dimensions}; this model's vectors have {width}",
            param="dimensions",
        )
    return vectors


async def _read(
    served: Served, voice: Voice, prompts: Sequence[list[int]], pooling: Pooling
) -> list[Pooled]:
    asks = [
        Ask(prompt, _READ_ONLY, adapter=voice.adapter, read=lambda: Pooled(pooling))
        for prompt in prompts
    ]
    stream = await served.engine.open(asks)
    try:
        for _ in prompts:
            await stream.next()
    finally:
        stream.close()
    return [each.reader for each in stream.sequences if isinstance(each.reader, Pooled)]


def _written(vector_D: Tensor, asked: EmbeddingRequest) -> list[float] | str:
    """In base64: fp32, the smallest byte first."""
    if asked.encoding_format == "base64":
        return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()
    values: list[float] = vector_D.tolist()
    return values

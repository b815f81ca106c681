"""The inference contract: a dialect of OpenAI's, with a model that is loaded for all requests."""

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from tunesmith.api.auth import Caller, caller, pace
from tunesmith.api.deps import HubDep
from tunesmith.api.stream import EventStream
from tunesmith.api.strict import StrictRoute
from tunesmith.errors import RateLimitError, TuningAPIError
from tunesmith.hub import Hub
from tunesmith.hub.answers import Answer
from tunesmith.hub.loaded import short
from tunesmith.hub.principal import Principal
from tunesmith.infer import contract
from tunesmith.infer.contract import Chat, Generate, Reply
from tunesmith.store.defaults import Default
from tuning_sdk.errors import error_for


class InferenceRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return hub.settings.max_chat_bytes


router = APIRouter(tags=["inference"], route_class=InferenceRoute, dependencies=[Depends(caller)])


@router.post("/generate", summary="Go on with a text")
async def generate(body: Generate, request: Request, hub: HubDep, who: Caller) -> Response:
    await pace(request, hub)
    return await _answer(body, hub, who)


@router.post("/chat", summary="Answer an instruction, or a conversation")
async def chat(body: Chat, request: Request, hub: HubDep, who: Caller) -> Response:
    await pace(request, hub)
    return await _answer(body, hub, who)


@router.get("/model_info", summary="The model that is loaded")
async def model_info(hub: HubDep, who: Caller) -> dict[str, Any]:
    return await hub.loaded.describe(who)


@router.post("/load_model", summary="Load the model that requests without one mean")
async def load_model(
    hub: HubDep,
    who: Caller,
    model_path: Annotated[
        str, Query(min_length=1, max_length=4096, description="As `model` names one elsewhere")
    ],
    load_in_8bit: Annotated[bool, Query(description="Weights of 8 bits")] = False,
    load_in_4bit: Annotated[bool, Query(description="Weights of 4 bits")] = False,
) -> dict[str, str]:
    precision = contract.precision_of(load_in_8bit, load_in_4bit)
    await hub.loaded.load(model_path, precision, who)
    return contract.loaded(short(model_path), model_path)


async def _answer(asked: Generate | Chat, hub: Hub, who: Principal) -> Response:
    default = None if asked.model else hub.loaded.of(who)
    model, precision = default or Default(asked.model or "", "")
    reply = Reply(asked, short(model) if default else model)
    answer = await hub.engines.ask(reply.path, model, asked.body(model), who, precision or None)
    if answer.is_stream:
        return EventStream(_frames(reply, answer), answer.close)
    try:
        if answer.status >= 400:
            raise _refusal(answer)
        return JSONResponse(reply.whole(json.loads(answer.body)))
    finally:
        await answer.close()


async def _frames(reply: Reply, answer: Answer) -> AsyncGenerator[bytes, None]:
    async for frame in reply.frames(answer.parts()):
        yield frame


def _refusal(answer: Answer) -> TuningAPIError:
    """What the engine refused, in this contract's shape."""
    error = error_for(answer.status, answer.message())
    wait = answer.headers.get("retry-after", "")
    if isinstance(error, RateLimitError) and wait.isdigit():
        error.retry_after = int(wait)
    return error

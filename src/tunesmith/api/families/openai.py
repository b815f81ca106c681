"""The OpenAI contract, as far as it is inference: models, chat completions, completions,
embeddings.

The body goes to the engine that holds the model as it came, but for the model's name; what comes
back goes to the client as it comes.
"""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from tunesmith.api.auth import KeyHolder, key_holder, pace
from tunesmith.api.deps import HubDep
from tunesmith.api.families import openai_bodies
from tunesmith.api.piped import Piped
from tunesmith.api.strict import StrictRoute, read_json
from tunesmith.errors import BadRequestError
from tunesmith.hub import Hub


class OpenAiRoute(StrictRoute):
    def body_limit(self, hub: Hub) -> int:
        return hub.settings.max_chat_bytes


router = APIRouter(
    prefix="/v1", tags=["openai"], route_class=OpenAiRoute, dependencies=[Depends(key_holder)]
)


@router.get("/models", summary="Models that can be named in a request")
def list_models(hub: HubDep, who: KeyHolder) -> dict[str, Any]:
    data = [_model(*one) for one in hub.served_names(who)]
    return {"object": "list", "data": data}


def _model(name: str, created: float, owner: str) -> dict[str, Any]:
    """No gate has compared a checkpoint with its trainer: that is said."""
    shown = {"id": name, "object": "model", "created": int(created), "owned_by": owner}
    return shown | {"gated": False} if ":ckpt-step-" in name else shown


@router.get("/models/{model:path}", summary="One model")
def get_model(model: str, hub: HubDep, who: KeyHolder) -> dict[str, Any]:
    if model in hub.engines.foreign.names:
        return _model(model, 0, "external")
    found = hub.find_model(model, who, field="model")
    return _model(model, 0, found.owner)


@router.post("/chat/completions", summary="Chat with a model", openapi_extra=openai_bodies.CHAT)
async def chat(request: Request, hub: HubDep, who: KeyHolder) -> Response:
    return await _forward("/v1/chat/completions", request, hub, who)


@router.post("/completions", summary="Continue a text", openapi_extra=openai_bodies.COMPLETIONS)
async def complete(request: Request, hub: HubDep, who: KeyHolder) -> Response:
    return await _forward("/v1/completions", request, hub, who)


@router.post("/embeddings", summary="Texts as vectors", openapi_extra=openai_bodies.EMBEDDINGS)
async def embed(request: Request, hub: HubDep, who: KeyHolder) -> Response:
    return await _forward("/v1/embeddings", request, hub, who)


async def _forward(path: str, request: Request, hub: HubDep, who: KeyHolder) -> Response:
    await pace(request, hub)
    body = await _object(request)
    model = body.get("model")
    if not isinstance(model, str) or not 1 <= len(model) <= 4096:
        raise BadRequestError("model: a model's name is wanted", param="model")
    answer = await hub.engines.ask(path, model, body, who)
    headers = {name: value for name, value in answer.headers.items() if name in _KEPT_HEADERS}
    if answer.is_stream:
        return Piped(answer)
    await answer.close()
    return Response(answer.body, answer.status, headers, media_type="application/json")


_KEPT_HEADERS = {"retry-after", "x-should-retry"}


async def _object(request: Request) -> dict[str, Any]:
    body = read_json(await request.body())
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body
